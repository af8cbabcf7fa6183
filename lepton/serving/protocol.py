"""The Open Inference Protocol, version 2, REST: requests to rows, outputs to responses.

Source: the protocol's "Inference Request JSON Object", with tensors in JSON or, after it, in raw
bytes (see :mod:`lepton.serving.binary`). Pure: bytes and values in, values out. Whatever a client
gets wrong is a :class:`BadRequest` that says what was expected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any, cast

import numpy as np
import orjson
import pyarrow as pa

from lepton.serving.arrays import Arrays
from lepton.serving.binary import array_of, raw_of, split
from lepton.serving.inputs import (
    MAX_ROWS,
    BadRequest,
    Input,
    checked,
    datatype_of,
    dtype_of,
    expected,
    input_of,
    typed,
)

PATIENCE = "x-request-timeout-ms"
"""The header by which a request of any form tells when its client wants no answer any more."""
_LONGEST = 12  # characters of it


@dataclass(frozen=True, kw_only=True, slots=True)
class Inquiry:
    """An inference request, read and checked.

    Attributes:
        rows: raw, a column per input.
        identity: the client's request id, or an empty string.
        wanted: the outputs asked for, in that order, and whether as raw bytes; none means all.
        raw: outputs not named come as raw bytes.
        patience_s: seconds after which the client wants no answer any more, or None.
        size: bytes of the body.
        plain: it came as plain rows, and so goes the answer.
    """

    rows: pa.Table
    identity: str
    wanted: Mapping[str, bool]
    raw: bool = False
    patience_s: float | None = None
    size: int = 0
    plain: bool = False


def rows_of(body: bytes, inputs: Sequence[Input]) -> tuple[pa.Table, str]:
    """Parse a request in JSON alone.

    Returns:
        The rows, a column per input; and the client's request id, or an empty string.

    Raises:
        BadRequest: as for :func:`inquiry_of`.
    """
    found = inquiry_of(body, inputs)
    return found.rows, found.identity


def inquiry_of(
    body: bytes,
    inputs: Sequence[Input],
    outputs: Sequence[str] | None = None,
    header: str | None = None,
) -> Inquiry:
    """Parse a request.

    Args:
        body: unpacked.
        inputs: what the model takes.
        outputs: what it gives; None lets a request ask for any.
        header: of Inference-Header-Content-Length, if raw tensors follow the JSON.

    Raises:
        BadRequest: not JSON, or an input is missing, unknown, of another shape or type, or not
            finite; or an output is asked for that the model does not give.
    """
    text, raw = split(body, header)
    try:
        request: Any = orjson.loads(text)
    except orjson.JSONDecodeError as e:
        raise BadRequest(f"the body is not JSON: {e}; {expected(inputs)}") from e
    if not isinstance(request, dict):
        raise BadRequest(f"the body must be a JSON object; {expected(inputs)}")
    request = cast("dict[str, Any]", request)
    given = _objects(request, "inputs", inputs)
    tensors = {str(t.get("name")): t for t in given}
    if tensors.keys() != {i.name for i in inputs} or len(tensors) != len(given):
        raise BadRequest(f"inputs are {list(tensors)}; {expected(inputs)}")
    pieces = _pieces(given, raw)
    columns = {i.name: _column(tensors[i.name], pieces.get(i.name), i, inputs) for i in inputs}
    counts = {len(c) for c in columns.values()}
    if len(counts) != 1:
        raise BadRequest(f"inputs have different numbers of rows: {sorted(counts)}")
    identity = request.get("id", "")
    if not isinstance(identity, str) or len(identity) > 256:
        raise BadRequest("'id' must be a string of at most 256 characters")
    asked = _parameters(request, "the request")
    as_raw = _flag(asked, "binary_data_output", default=False)
    return Inquiry(
        rows=pa.table(columns),
        identity=identity,
        wanted=_wanted(request, inputs, outputs, as_raw) if "outputs" in request else {},
        raw=as_raw,
        patience_s=_patience(asked),
        size=len(body),
    )


def _objects(request: Mapping[str, Any], key: str, inputs: Sequence[Input]) -> list[dict[str, Any]]:
    found: Any = request.get(key)
    if not isinstance(found, list) or not all(
        isinstance(t, dict) for t in cast("list[Any]", found)
    ):
        raise BadRequest(f"the body has no list {key!r} of objects; {expected(inputs)}")
    return cast("list[dict[str, Any]]", found)


def _parameters(holder: Mapping[str, Any], whose: str) -> Mapping[str, Any]:
    found: Any = holder.get("parameters", {})
    if not isinstance(found, dict):
        raise BadRequest(f"'parameters' of {whose} must be a JSON object")
    parameters = cast("dict[str, Any]", found)
    for name in ("shared_memory_region", "classification"):
        if name in parameters:
            raise BadRequest(f"{whose}: parameter {name!r} is not supported here")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, *, default: bool) -> bool:
    found: Any = parameters.get(name, default)
    if not isinstance(found, bool):
        raise BadRequest(f"parameter {name!r} must be true or false")
    return found


def _patience(parameters: Mapping[str, Any]) -> float | None:
    """Seconds; the parameter has microseconds, as Triton's clients send it."""
    found: Any = parameters.get("timeout")
    if found is None or found == 0:
        return None
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        raise BadRequest("parameter 'timeout' must be a whole number of microseconds")
    return found / 1e6


def patience_of(headers: Mapping[str, str], patience_s: float | None) -> float | None:
    """Return the seconds that a client waits at most, or None: the fewer that it told.

    Args:
        headers: of the request, which may have :data:`PATIENCE`, whole milliseconds; 0 is none.
        patience_s: by its body.

    Raises:
        BadRequest: the header is no such number.
    """
    told = headers.get(PATIENCE)
    if told is None:
        return patience_s
    if not is_patience(told):
        raise BadRequest(f"header {PATIENCE} must be a whole number of milliseconds")
    found = int(told) / 1000
    return min(found, patience_s or found) if found else patience_s


def is_patience(told: str | bytes) -> bool:
    """Whether the header :data:`PATIENCE` may be this."""
    return told.isdigit() and told.isascii() and len(told) <= _LONGEST


def _wanted(
    request: Mapping[str, Any], inputs: Sequence[Input], outputs: Sequence[str] | None, raw: bool
) -> dict[str, bool]:
    found: dict[str, bool] = {}
    for output in _objects(request, "outputs", inputs):
        name = output.get("name")
        known = isinstance(name, str) and (outputs is None or name in outputs)
        if not known or name in found:
            raise BadRequest(
                f"output {name!r} is not one of the model's, or is asked for twice: "
                f"it gives {list(outputs or ())}"
            )
        parameters = _parameters(output, f"output {name!r}")
        found[cast(str, name)] = _flag(parameters, "binary_data", default=raw)
    return found


def _pieces(given: Sequence[Mapping[str, Any]], raw: memoryview) -> dict[str, memoryview]:
    """Cut the raw bytes into the tensors that announced theirs, in the order of the JSON."""
    pieces: dict[str, memoryview] = {}
    at = 0
    for tensor in given:
        name = str(tensor.get("name"))
        size: Any = _parameters(tensor, f"input {name!r}").get("binary_data_size")
        if size is None:
            continue
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(raw) - at:
            raise BadRequest(
                f"input {name!r}: binary_data_size is {size!r}, {len(raw) - at} raw bytes are "
                "left after the JSON (its length belongs into Inference-Header-Content-Length)"
            )
        pieces[name] = raw[at : at + size]
        at += size
    if at != len(raw):
        raise BadRequest(f"the body has {len(raw) - at} raw bytes that belong to no input")
    return pieces


def _column(
    tensor: Mapping[str, Any], raw: memoryview | None, spec: Input, inputs: Sequence[Input]
) -> Any:
    datatype, shape = tensor.get("datatype"), tensor.get("shape")
    if datatype != spec.datatype:
        raise BadRequest(f"input {spec.name!r} has datatype {datatype!r}; {expected(inputs)}")
    if not _fits(shape, spec):
        raise BadRequest(
            f"input {spec.name!r} has shape {shape!r}, wanted [rows, "
            f"{', '.join(map(str, spec.shape))}] with 1 to {MAX_ROWS} rows; {expected(inputs)}"
        )
    shape = cast("list[int]", shape)
    if raw is None:
        return checked(typed(flat(tensor.get("data"), shape, spec.name), spec), spec)
    if "data" in tensor:
        raise BadRequest(f"input {spec.name!r} has both 'data' and raw bytes")
    return checked(array_of(raw, spec, prod(shape)), spec)


def _fits(shape: object, spec: Input) -> bool:
    if not isinstance(shape, list):
        return False
    sizes = cast("list[object]", shape)
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in sizes) or not sizes:
        return False
    return tuple(sizes[1:]) == spec.shape and 1 <= cast(int, sizes[0]) <= MAX_ROWS


def flat(data: Any, shape: Sequence[int], name: str) -> list[Any]:
    """Return nested or already flat data as one list, checked against its shape."""
    if not isinstance(data, list):
        raise BadRequest(f"input {name!r} has no list 'data'")
    level = cast("list[Any]", data)
    if len(shape) == 1 or not any(isinstance(v, list) for v in level):
        return _sized(level, prod(shape), name)
    _sized(level, shape[0], name)
    for size in shape[1:]:
        if not all(isinstance(v, list) and len(cast("list[Any]", v)) == size for v in level):
            raise BadRequest(
                f"input {name!r}: 'data' is not nested as its shape {list(shape)} says"
            )
        level = list(chain.from_iterable(level))
    return level


def _sized(values: list[Any], size: int, name: str) -> list[Any]:
    if len(values) != size:
        raise BadRequest(f"input {name!r}: 'data' has {len(values)} values, its shape says {size}")
    return values


def response_of(
    model: str, version: int, identity: str, outputs: Mapping[str, np.ndarray[Any, Any]]
) -> bytes:
    """Return the response body with every output in JSON."""
    return reply_of(model, version, identity, outputs)[0]


def reply_of(
    model: str,
    version: int,
    identity: str,
    outputs: Mapping[str, np.ndarray[Any, Any]],
    inquiry: Inquiry | Arrays | None = None,
) -> tuple[bytes, int | None]:
    """Return the response body as the request wanted it.

    Returns:
        The body; and the length of its JSON in bytes if raw tensors follow, else None.
    """
    wanted: Mapping[str, bool] = inquiry.wanted if inquiry else {}
    otherwise = inquiry.raw if inquiry else False
    told: list[dict[str, Any]] = []
    raw: list[bytes] = []
    for name in list(wanted) or list(outputs):
        values = outputs[name]
        tensor: dict[str, Any] = {
            "name": name,
            "datatype": datatype_of(values.dtype),
            "shape": list(values.shape),
        }
        if wanted.get(name, otherwise):
            raw.append(raw_of(values))
            tensor["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            tensor["data"] = np.ascontiguousarray(values).reshape(-1)
        told.append(tensor)
    body = {
        "model_name": model,
        "model_version": str(version),
        "id": identity,
        "outputs": told,
    }
    text = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    return (b"".join((text, *raw)), len(text)) if raw else (text, None)


def request_of(rows: pa.Table, inputs: Sequence[Mapping[str, Any]], identity: str = "") -> bytes:
    """Return a request body for rows, given the inputs of the model's metadata."""
    tensors: list[dict[str, Any]] = []
    for spec in inputs:
        column: Any = rows.column(spec["name"]).combine_chunks()
        data: list[Any] = column.to_pylist()
        shape = [len(rows), *spec["shape"][1:]]
        tensors.append({**spec, "shape": shape, "data": data})
    return orjson.dumps({"id": identity, "inputs": tensors})


def raw_request_of(
    arrays: Mapping[str, np.ndarray[Any, Any]], identity: str = ""
) -> tuple[bytes, int]:
    """Return a request body with raw tensors, numbers only, and the length of its JSON in bytes.

    All outputs are asked for as raw bytes too.
    """
    raws = {name: raw_of(values) for name, values in arrays.items()}
    inputs = [
        {
            "name": name,
            "datatype": datatype_of(values.dtype),
            "shape": list(values.shape),
            "parameters": {"binary_data_size": len(raws[name])},
        }
        for name, values in arrays.items()
    ]
    text = orjson.dumps(
        {"id": identity, "parameters": {"binary_data_output": True}, "inputs": inputs}
    )
    return b"".join((text, *raws.values())), len(text)


def outputs_of_reply(body: bytes, header: str | None = None) -> dict[str, np.ndarray[Any, Any]]:
    """Return the outputs of a response, in JSON or raw, as arrays of shape (rows, …)."""
    text, raw = split(body, header)
    found: dict[str, np.ndarray[Any, Any]] = {}
    at = 0
    for tensor in orjson.loads(text)["outputs"]:
        dtype, shape = dtype_of(tensor["datatype"]), tensor["shape"]
        if "data" in tensor:
            found[tensor["name"]] = np.array(tensor["data"], dtype).reshape(shape)
            continue
        end = at + tensor["parameters"]["binary_data_size"]
        found[tensor["name"]] = np.frombuffer(raw[at:end], dtype).reshape(shape).copy()
        at = end
    return found


__all__ = [
    "PATIENCE",
    "BadRequest",
    "Input",
    "Inquiry",
    "datatype_of",
    "dtype_of",
    "input_of",
    "inquiry_of",
    "is_patience",
    "outputs_of_reply",
    "patience_of",
    "raw_request_of",
    "reply_of",
    "request_of",
    "response_of",
    "rows_of",
]
