"""The Open Inference Protocol, version 2, REST with JSON: requests to rows, outputs to responses.

Source: the protocol's "Inference Request JSON Object". Pure: bytes and values in, values out.
Whatever a client gets wrong is a :class:`BadRequest` that says what was expected.
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

MAX_ROWS = 4096

_ARROW: dict[str, pa.DataType] = {
    "BOOL": pa.bool_(),
    "INT8": pa.int8(),
    "INT16": pa.int16(),
    "INT32": pa.int32(),
    "INT64": pa.int64(),
    "UINT8": pa.uint8(),
    "FP32": pa.float32(),
    "FP64": pa.float64(),
    "BYTES": pa.string(),
}
_NAMES = {str(kind): name for name, kind in _ARROW.items()} | {"binary": "BYTES"}


class BadRequest(ValueError):  # noqa: N818 - the protocol's word
    """The client's request is wrong; the message says what was expected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """One input of a model, as clients send it: raw, before preparation.

    Attributes:
        name: the column.
        datatype: the protocol's name, such as FP32.
        shape: of one row.
        nullable: the preparation fills missing values.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    nullable: bool = False

    def describe(self) -> dict[str, Any]:
        """Return the protocol's metadata of this tensor."""
        return {"name": self.name, "datatype": self.datatype, "shape": [-1, *self.shape]}


def input_of(name: str, element: str, shape: Sequence[int], *, nullable: bool = False) -> Input:
    """Return the input for a column whose elements have an Arrow type of that name."""
    datatype = _NAMES.get(element, "FP32")
    return Input(name=name, datatype=datatype, shape=tuple(shape), nullable=nullable)


def rows_of(body: bytes, inputs: Sequence[Input]) -> tuple[pa.Table, str]:
    """Parse a request into raw rows.

    Returns:
        The rows, a column per input; and the client's request id, or an empty string.

    Raises:
        BadRequest: not JSON, or an input is missing, unknown, of another shape or type, or not
            finite.
    """
    try:
        request: Any = orjson.loads(body)
    except orjson.JSONDecodeError as e:
        raise BadRequest(f"the body is not JSON: {e}; {_expected(inputs)}") from e
    if not isinstance(request, dict):
        raise BadRequest(f"the body must be a JSON object; {_expected(inputs)}")
    request = cast("dict[str, Any]", request)
    given: Any = request.get("inputs")
    if not isinstance(given, list) or not all(
        isinstance(t, dict) for t in cast("list[Any]", given)
    ):
        raise BadRequest(f"the body has no list 'inputs'; {_expected(inputs)}")
    tensors = {str(t.get("name")): t for t in cast("list[dict[str, Any]]", given)}
    known = {i.name for i in inputs}
    if tensors.keys() != known or len(tensors) != len(cast("list[Any]", given)):
        raise BadRequest(f"inputs are {list(tensors)}; {_expected(inputs)}")
    columns = {i.name: _column(tensors[i.name], i, inputs) for i in inputs}
    counts = {len(c) for c in columns.values()}
    if len(counts) != 1:
        raise BadRequest(f"inputs have different numbers of rows: {sorted(counts)}")
    identity = request.get("id", "")
    if not isinstance(identity, str) or len(identity) > 256:
        raise BadRequest("'id' must be a string of at most 256 characters")
    return pa.table(columns), identity


def _expected(inputs: Sequence[Input]) -> str:
    return "expected inputs: " + orjson.dumps([i.describe() for i in inputs]).decode()


def _column(tensor: Mapping[str, Any], spec: Input, inputs: Sequence[Input]) -> Any:
    datatype, shape = tensor.get("datatype"), tensor.get("shape")
    if datatype != spec.datatype:
        raise BadRequest(f"input {spec.name!r} has datatype {datatype!r}; {_expected(inputs)}")
    if not _fits(shape, spec):
        raise BadRequest(
            f"input {spec.name!r} has shape {shape!r}, wanted [rows, "
            f"{', '.join(map(str, spec.shape))}] with 1 to {MAX_ROWS} rows; {_expected(inputs)}"
        )
    shape = cast("list[int]", shape)
    values = _flat(tensor.get("data"), shape, spec.name)
    array = _typed(values, spec)
    if not spec.shape:
        return array
    return pa.FixedSizeListArray.from_arrays(array, prod(spec.shape))


def _fits(shape: object, spec: Input) -> bool:
    if not isinstance(shape, list):
        return False
    sizes = cast("list[object]", shape)
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in sizes) or not sizes:
        return False
    return tuple(sizes[1:]) == spec.shape and 1 <= cast(int, sizes[0]) <= MAX_ROWS


def _flat(data: Any, shape: Sequence[int], name: str) -> list[Any]:
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


def _typed(values: list[Any], spec: Input) -> Any:
    kind = _ARROW[spec.datatype]
    wrong_bool = spec.datatype != "BOOL" and any(isinstance(v, bool) for v in values)
    try:
        array: Any = pa.array(values, type=kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, ValueError, TypeError) as e:
        raise BadRequest(f"input {spec.name!r}: values are not {spec.datatype}: {e}") from e
    if wrong_bool:
        raise BadRequest(
            f"input {spec.name!r}: values are not {spec.datatype}: true or false in it"
        )
    if array.null_count and not spec.nullable:
        raise BadRequest(f"input {spec.name!r}: null is not allowed")
    if pa.types.is_floating(kind) and not np.isfinite(array.drop_null().to_numpy()).all():
        raise BadRequest(f"input {spec.name!r}: values must be finite {spec.datatype} numbers")
    return array


def response_of(
    model: str, version: int, identity: str, outputs: Mapping[str, np.ndarray[Any, Any]]
) -> bytes:
    """Return the response body."""
    body = {
        "model_name": model,
        "model_version": str(version),
        "id": identity,
        "outputs": [
            {
                "name": name,
                "datatype": datatype_of(values.dtype),
                "shape": list(values.shape),
                "data": np.ascontiguousarray(values).reshape(-1),
            }
            for name, values in outputs.items()
        ],
    }
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def request_of(rows: pa.Table, inputs: Sequence[Mapping[str, Any]], identity: str = "") -> bytes:
    """Return a request body for rows, given the inputs of the model's metadata."""
    tensors: list[dict[str, Any]] = []
    for spec in inputs:
        column: Any = rows.column(spec["name"]).combine_chunks()
        data: list[Any] = column.to_pylist()
        shape = [len(rows), *spec["shape"][1:]]
        tensors.append({**spec, "shape": shape, "data": data})
    return orjson.dumps({"id": identity, "inputs": tensors})


def datatype_of(dtype: np.dtype[Any]) -> str:
    """Return the protocol's name of a NumPy dtype."""
    if dtype == np.bool_:
        return "BOOL"
    prefix = {"f": "FP", "i": "INT", "u": "UINT"}[dtype.kind]
    return f"{prefix}{dtype.itemsize * 8}"


def dtype_of(datatype: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a protocol datatype."""
    if datatype == "BOOL":
        return np.dtype(np.bool_)
    kind = datatype.rstrip("0123456789")
    letter = {"FP": "f", "INT": "i", "UINT": "u"}[kind]
    return np.dtype(f"{letter}{int(datatype.removeprefix(kind)) // 8}")
