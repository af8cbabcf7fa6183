"""The requests that most clients send most of the time, read without detours. Pure.

A request of numbers alone, in JSON or in raw bytes, can be read straight into NumPy arrays, which a
net without a preparation takes as they are. :func:`arrays_in` does so where nothing can be wrong
with it. Where there is any doubt it returns None, and :func:`lepton.serving.protocol.inquiry_of`
decides, and says what is wrong: the two never differ in what they accept (a test holds them
together).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from lepton.serving.inputs import MAX_ROWS, Input

DTYPES: Mapping[str, Any] = {
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "INT64": np.dtype(np.int64),
}
_EXACT = 2**24  # up to here every whole number is an FP32, so also an FP64
_KEYS = frozenset({"id", "inputs", "parameters"})


@dataclass(frozen=True, slots=True, eq=False)
class Arrays:
    """Raw rows of a request, checked: by input, C-ordered arrays of shape (rows, …).

    It is both the inquiry and its rows (:class:`lepton.serving.protocol.Inquiry` has them apart).

    Attributes:
        columns: in the order of the model's inputs.
        count: of rows.
        identity: the client's request id, or an empty string.
        raw: the client wants the answer in raw bytes.
        size: bytes of the body.
        wanted: no outputs in particular.
        plain: it did not come as plain rows.
    """

    columns: Mapping[str, np.ndarray[Any, Any]]
    count: int
    identity: str = ""
    raw: bool = False
    size: int = 0
    wanted: Mapping[str, bool] = field(default_factory=dict[str, bool])
    plain: bool = False

    @property
    def rows(self) -> Arrays:
        """The rows."""
        return self

    def __len__(self) -> int:
        """How many rows."""
        return self.count

    def table(self) -> pa.Table:
        """Return them as an Arrow table, a column per input."""
        return pa.table({name: column_of(values) for name, values in self.columns.items()})


def joined(several: Sequence[Arrays]) -> Arrays:
    """Return the rows of several requests for one model, one after the other."""
    columns = {n: np.concatenate([a.columns[n] for a in several]) for n in several[0].columns}
    return Arrays(columns, sum([a.count for a in several]))


def column_of(values: np.ndarray[Any, Any]) -> Any:
    """Return an array of shape (rows, …) as an Arrow array of rows."""
    flat: Any = pa.array(values.reshape(-1))
    if values.ndim == 1:
        return flat
    return pa.FixedSizeListArray.from_arrays(flat, prod(values.shape[1:]))


def can_read(inputs: Sequence[Input]) -> bool:
    """Whether such inputs can be arrays at all."""
    return all(spec.datatype in DTYPES for spec in inputs)


def arrays_in(body: bytes, header: bytes | None, inputs: Sequence[Input]) -> Arrays | None:
    """Read a request, or return None if it has to be looked at more closely.

    Args:
        body: not compressed.
        header: Inference-Header-Content-Length, where raw bytes follow the JSON.
        inputs: what the model takes, for which :func:`can_read` holds.
    """
    raw: Any = b""
    if header is not None:
        if not header.isdigit() or int(header) > len(body):
            return None
        body, raw = body[: int(header)], memoryview(body)[int(header) :]
    plain = b"true" not in body and b"false" not in body
    try:
        request: Any = orjson.loads(body)
        given = request["inputs"]
        if not _KEYS.issuperset(request) or len(given) != len(inputs):
            return None
        columns: dict[str, np.ndarray[Any, Any]] = {}
        at = 0
        for tensor, spec in zip(given, inputs, strict=True):
            if tensor["name"] != spec.name or tensor["datatype"] != spec.datatype:
                return None
            shape = tensor["shape"]
            if "data" in tensor:
                values = _told(tensor, spec, plain=plain)
            else:
                values, at = _cut(tensor, raw, at, spec)
            columns[spec.name] = values.reshape(_rows(shape, spec), *spec.shape)
            # the same as .all(), without the layers of it that cost more than the look itself
            if values.dtype.kind == "f" and b"\0" in np.isfinite(values).tobytes():
                return None
    except (ValueError, TypeError, KeyError, OverflowError, AttributeError):
        return None
    counts = {len(values) for values in columns.values()}
    asked = request.get("parameters")
    identity = request.get("id", "")
    wrong = type(identity) is not str or len(identity) > 256 or len(counts) != 1 or at != len(raw)
    if wrong or (asked is not None and asked != {"binary_data_output": True}):
        return None
    return Arrays(columns, counts.pop(), identity, bool(asked), len(body) + len(raw))


def _told(tensor: Mapping[str, Any], spec: Input, *, plain: bool) -> np.ndarray[Any, Any]:
    """The values of a tensor in JSON, flat or nested by rows.

    NumPy alone would take true for one and, beyond what is exact, round whole numbers.
    """
    if "parameters" in tensor:
        raise ValueError("parameters")
    data = tensor["data"]
    values = np.array(data)
    nested = values.ndim == 2
    if values.ndim != 1 and not (nested and spec.shape == values.shape[1:]):
        raise ValueError("nested otherwise")
    whole = spec.datatype == "INT64"
    if values.dtype.kind not in ("i" if whole else "fi"):
        raise TypeError(values.dtype)
    low, high = (values.min(), values.max()) if not whole else (0, 0)
    if not plain or not (low >= -_EXACT and high <= _EXACT):
        kinds = set(map(type, chain.from_iterable(data) if nested else data))
        if kinds != {int if whole else float}:
            raise TypeError(kinds)
        if not whole and not max(-low, high) <= np.finfo(DTYPES[spec.datatype]).max:
            raise OverflowError(high)
    return values.astype(DTYPES[spec.datatype], copy=False)


def _cut(
    tensor: Mapping[str, Any], raw: Any, at: int, spec: Input
) -> tuple[np.ndarray[Any, Any], int]:
    """The values of a tensor in raw bytes, and where the next one begins."""
    ((key, size),) = tensor["parameters"].items()
    if key != "binary_data_size" or type(size) is not int or not 0 < size <= len(raw) - at:
        raise ValueError("parameters")
    # Of its own and in its place: what is computed with it is quicker than with the body's bytes.
    own = bytearray(raw[at : at + size])
    return np.frombuffer(own, DTYPES[spec.datatype]), at + size


def _rows(shape: Any, spec: Input) -> int:
    """The leading one of a shape that fits."""
    sizes: list[Any] = shape if type(shape) is list else []
    if set(map(type, sizes)) != {int} or tuple(sizes[1:]) != spec.shape:
        raise ValueError("shape")
    if not 1 <= sizes[0] <= MAX_ROWS:
        raise ValueError("rows")
    return sizes[0]
