"""What a model takes, and the checks that every request passes, whatever form its values came in.

Source of the datatypes: the Open Inference Protocol, version 2, "Tensor Data Types". Pure.
Invariant: a column that left :func:`checked` holds the type the model was trained on, a null only
where the preparation fills it, and no NaN or infinity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

MAX_ROWS = 4096
MAX_BYTES = 32 * 2**20

ARROW: Mapping[str, pa.DataType] = {
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
_NAMES = {str(kind): name for name, kind in ARROW.items()} | {"binary": "BYTES"}


class BadRequest(ValueError):  # noqa: N818 - the protocol's word
    """The client's request is wrong; the message says what was expected.

    Attributes:
        status: the HTTP status that says so, from 400 to 499.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


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


def expected(inputs: Sequence[Input]) -> str:
    """Return the end of a message: what the model takes."""
    return "expected inputs: " + orjson.dumps([i.describe() for i in inputs]).decode()


def checked(array: Any, spec: Input) -> Any:
    """Return a flat Arrow array of an input's values as a column, one entry a row.

    Raises:
        BadRequest: a null where none is allowed, or a number that is not finite.
    """
    if array.null_count and not spec.nullable:
        raise BadRequest(f"input {spec.name!r}: null is not allowed")
    if pa.types.is_floating(array.type):
        present = array.drop_null() if array.null_count else array
        if not np.isfinite(present.to_numpy()).all():
            raise BadRequest(f"input {spec.name!r}: values must be finite {spec.datatype} numbers")
    return pa.FixedSizeListArray.from_arrays(array, prod(spec.shape)) if spec.shape else array


def typed(values: list[Any], spec: Input) -> Any:
    """Return JSON values as an Arrow array of an input's type.

    Raises:
        BadRequest: they are not of that type.
    """
    try:
        array: Any = pa.array(values, type=ARROW[spec.datatype])
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, ValueError, TypeError) as e:
        raise BadRequest(f"input {spec.name!r}: values are not {spec.datatype}: {e}") from e
    if spec.datatype != "BOOL" and bool in set(map(type, values)):
        raise BadRequest(
            f"input {spec.name!r}: values are not {spec.datatype}: true or false in it"
        )
    return array


def datatype_of(dtype: np.dtype[Any]) -> str:
    """Return the protocol's name of a NumPy dtype."""
    if dtype == np.bool_:
        return "BOOL"
    prefix = {"f": "FP", "i": "INT", "u": "UINT"}[dtype.kind]
    return f"{prefix}{dtype.itemsize * 8}"


def dtype_of(datatype: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a protocol datatype, little-endian as it travels."""
    if datatype == "BOOL":
        return np.dtype(np.bool_)
    kind = datatype.rstrip("0123456789")
    letter = {"FP": "f", "INT": "i", "UINT": "u"}[kind]
    return np.dtype(f"<{letter}{int(datatype.removeprefix(kind)) // 8}")
