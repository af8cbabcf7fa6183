"""The steps of a preparation: each a pure function of one column, with its parameters fitted.

A step keeps the number and order of rows, works element by element, and has one result type per
input type. Together these are the no-skew property: a row gives the same bits in a training batch
and alone in a request.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lepton.preprocess.elements import (
    Floats,
    element_type,
    is_number,
    is_text,
    map_elements,
    to_floats,
    with_elements,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cast:
    """Cast a column, or the elements of a list or tensor column, to a type that has a plain name.

    The cast is checked: a value that the type cannot hold raises ValueError, nothing is wrapped
    or cut off.
    """

    name: ClassVar[str] = "cast"
    column: str
    type: pa.DataType

    def __post_init__(self) -> None:
        if named_type(str(self.type)) != self.type:
            raise ValueError(f"Cast({self.column!r}): the type {self.type} has no plain name")

    def result(self, data_type: pa.DataType) -> pa.DataType:
        """Return the type that a column of ``data_type`` has after this step."""
        return with_elements(data_type, self.type)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the table with the column cast."""
        column = table.column(self.column)
        if self.result(column.type) == column.type:
            return table
        try:
            changed = map_elements(column, lambda a: pc.cast(a, self.type), self.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as e:
            raise ValueError(
                f"column {self.column!r} ({column.type}) cannot be cast to {self.type}: {e}"
            ) from e
        return _replace(table, self.column, changed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fill:
    """Put ``value`` where a scalar column is null, or NaN.

    The column keeps its type, except that an integer column filled with a float (a mean, a
    median) becomes float64.
    """

    name: ClassVar[str] = "fill"
    column: str
    value: bool | int | float | str

    def __post_init__(self) -> None:
        given = cast(object, self.value)
        if not isinstance(given, (bool, int, float, str)):
            raise TypeError(
                f"Fill({self.column!r}): value must be a bool, int, float or str, "
                f"not {type(given).__name__}"
            )
        if isinstance(self.value, float) and not math.isfinite(self.value):
            raise ValueError(f"Fill({self.column!r}): value must be finite, not {self.value}")

    def result(self, data_type: pa.DataType) -> pa.DataType:
        """Return the type that a column of ``data_type`` has after this step."""
        if self._fits(data_type):
            return pa.scalar(self.value).type if pa.types.is_null(data_type) else data_type
        if isinstance(self.value, float) and pa.types.is_integer(data_type):
            return pa.float64()
        raise ValueError(
            f"column {self.column!r} is {data_type}; its missing values cannot be filled with "
            f"{self.value!r}: give a value of the column's type, or cast the column first"
        )

    def typed(self, data_type: pa.DataType) -> pa.Scalar[Any]:
        """Return the value as a filled column of ``data_type`` holds it."""
        try:
            return pa.scalar(self.value, self.result(data_type))
        except (pa.ArrowInvalid, OverflowError) as e:
            raise ValueError(
                f"the fill value {self.value!r} does not fit column {self.column!r} ({data_type})"
            ) from e

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the table with the column filled."""
        column = table.column(self.column)
        value = self.typed(column.type)
        column = column.cast(value.type)
        missing = pc.is_null(column, nan_is_null=True)
        return _replace(table, self.column, pc.if_else(missing, value, column))

    def _fits(self, data_type: pa.DataType) -> bool:
        if pa.types.is_null(data_type):
            return True
        if isinstance(self.value, bool):
            return pa.types.is_boolean(data_type)
        if isinstance(self.value, str):
            return is_text(data_type)
        whole = isinstance(self.value, int) and pa.types.is_integer(data_type)
        return whole or pa.types.is_floating(data_type)


@dataclass(frozen=True, kw_only=True, slots=True)
class MinMax:
    """Scale numbers so that ``low`` becomes 0 and ``high`` 1, as float32.

    List and tensor columns are scaled element by element with the one pair. Values outside the
    fitted range fall outside [0, 1] unless ``clip``. Null and NaN stay. A column that was
    constant when fitted (``low == high``) becomes 0.
    """

    name: ClassVar[str] = "minmax"
    column: str
    low: float
    high: float
    clip: bool = False

    def __post_init__(self) -> None:
        _set_floats(self, "low", "high")
        if not 0 <= self.high - self.low < math.inf:
            raise ValueError(
                f"MinMax({self.column!r}): needs low <= high, a finite distance apart, "
                f"not {self.low} and {self.high}"
            )
        if not isinstance(cast(object, self.clip), bool):
            raise TypeError(f"MinMax({self.column!r}): clip must be true or false")

    def result(self, data_type: pa.DataType) -> pa.DataType:
        """Return the type that a column of ``data_type`` has after this step."""
        return scaled_type(self.column, data_type)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the table with the column scaled."""
        return _scale(table, self.column, self.low, self.high - self.low, clip=self.clip)


@dataclass(frozen=True, kw_only=True, slots=True)
class Standard:
    """Subtract ``mean`` and divide by ``std`` (of the population), as float32.

    List and tensor columns are scaled element by element with the one pair. Null and NaN stay.
    A column that was constant when fitted (``std == 0``) becomes 0.
    """

    name: ClassVar[str] = "standard"
    column: str
    mean: float
    std: float

    def __post_init__(self) -> None:
        _set_floats(self, "mean", "std")
        if self.std < 0:
            raise ValueError(f"Standard({self.column!r}): std must be >= 0, not {self.std}")

    def result(self, data_type: pa.DataType) -> pa.DataType:
        """Return the type that a column of ``data_type`` has after this step."""
        return scaled_type(self.column, data_type)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the table with the column scaled."""
        return _scale(table, self.column, self.mean, self.std, clip=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Categories:
    """Replace strings or integers by int64 codes: the position of the value in ``values``.

    A value that is not among them, and null, gets the code ``len(values)``: an embedding or
    one-hot layer over this column needs ``len(values) + 1`` entries.
    """

    name: ClassVar[str] = "categories"
    column: str
    values: tuple[str, ...] | tuple[int, ...]

    def __post_init__(self) -> None:
        if isinstance(self.values, str):
            raise TypeError(f"Categories({self.column!r}): values must be a sequence, not a str")
        object.__setattr__(self, "values", tuple(self.values))
        kinds = {type(v) for v in self.values}
        if kinds not in ({str}, {int}):
            raise ValueError(
                f"Categories({self.column!r}): values must be all str or all int, and not empty"
            )
        if len(set(self.values)) != len(self.values):
            raise ValueError(f"Categories({self.column!r}): a value is listed twice")
        if any(isinstance(v, int) and not -(2**63) <= v < 2**63 for v in self.values):
            raise ValueError(f"Categories({self.column!r}): integers must fit 64 bits")

    def result(self, data_type: pa.DataType) -> pa.DataType:
        """Return the type that a column of ``data_type`` has after this step."""
        integers = isinstance(self.values[0], int)
        whole = pa.types.is_integer(data_type) and not pa.types.is_uint64(data_type)
        if pa.types.is_null(data_type) or (whole if integers else is_text(data_type)):
            return pa.int64()
        raise ValueError(
            f"column {self.column!r} is {data_type}, but its categories are "
            f"{'integers' if integers else 'strings'}: cast the column first"
        )

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the table with the column coded."""
        column = table.column(self.column)
        self.result(column.type)
        known = pa.array(
            self.values, pa.int64() if isinstance(self.values[0], int) else pa.string()
        )
        found = pc.index_in(column.cast(known.type), value_set=known, skip_nulls=True)
        codes: Any = pc.fill_null(found.cast(pa.int64()), cast(Any, len(known)))
        return _replace(table, self.column, codes)


Step: TypeAlias = Cast | Fill | MinMax | Standard | Categories


def named_type(name: str) -> pa.DataType:
    """Return the Arrow type of a plain name such as ``float``, ``int64`` or ``timestamp[us]``.

    Raises:
        ValueError: no such name.
    """
    try:
        return pa.type_for_alias(cast(Any, name))
    except ValueError:
        raise ValueError(f"{name!r} names no plain Arrow type (int64, float, string, …)") from None


def _replace(table: pa.Table, name: str, column: pa.ChunkedArray[Any]) -> pa.Table:
    at = table.schema.get_field_index(name)
    return table.set_column(at, table.schema.field(at).with_type(column.type), column)


def _set_floats(step: MinMax | Standard, *names: str) -> None:
    for name in names:
        value: Any = getattr(step, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{step.name} of {step.column!r}: {name} must be a number")
        if not math.isfinite(value):
            raise ValueError(f"{step.name} of {step.column!r}: {name} must be finite, not {value}")
        object.__setattr__(step, name, float(value))


def scaled_type(column: str, data_type: pa.DataType) -> pa.DataType:
    """Return the type of a scaled column of ``data_type``.

    Raises:
        ValueError: its elements are not numbers.
    """
    if is_number(element_type(data_type)):
        return with_elements(data_type, pa.float32())
    raise ValueError(
        f"column {column!r} is {data_type}, which cannot be scaled: cast it to numbers, "
        "use categories for strings, or leave it out"
    )


def _scale(table: pa.Table, name: str, origin: float, span: float, *, clip: bool) -> pa.Table:
    column = table.column(name)
    scaled_type(name, column.type)

    def scaled(array: pa.Array[Any]) -> pa.Array[Any]:
        values = _scaled(to_floats(array), origin, span)
        if clip:
            np.clip(values, 0.0, 1.0, out=values)
        with np.errstate(over="ignore", invalid="ignore"):
            narrow = values.astype(np.float32)
        nulls = np.asarray(pc.is_null(array)) if array.null_count else None
        return pa.array(narrow, pa.float32(), mask=nulls)

    return _replace(table, name, map_elements(column, scaled, pa.float32()))


def _scaled(values: Floats, origin: float, span: float) -> Floats:
    if span == 0:
        return np.where(np.isnan(values), values, 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.subtract(values, origin)
        np.divide(scaled, span, out=scaled)
    return scaled
