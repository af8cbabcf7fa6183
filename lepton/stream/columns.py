"""Columns of read rows, ready to be cut into batches.

A number column without nulls becomes a NumPy array of shape (rows, …); so do lists and binary
values of one length. Everything else stays Arrow. Arrow values are put in order at once, numbers
when they are written to where they belong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lepton.stream.order import Ints

Values = Any  # np.ndarray of shape (rows, …), or pa.Array
Allocate = Callable[[tuple[int, ...], Any], Any]
Span = tuple["Column", int, int]
"""Delivered rows [low, high) of a column."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of some rows.

    Attributes:
        values: an ndarray of shape (rows, …), or an Arrow array in delivery order.
        type: the Arrow type.
        take: which of an ndarray's rows are delivered, in delivery order; None: all as they are.
    """

    values: Values
    type: Any
    take: Ints | None = None

    @property
    def form(self) -> tuple[Any, ...] | None:
        """What must agree for two columns to go into one array; None for Arrow."""
        return None if _is_arrow(self.values) else (self.values.dtype, self.values.shape[1:])

    def picked(self, low: int, high: int) -> Values:
        """Return delivered rows [low, high)."""
        if _is_arrow(self.values):
            return self.values.slice(low, high - low)
        if self.take is None:
            return self.values[low:high]
        return np.take(self.values, self.take[low:high], axis=0, mode="clip")

    def arrow(self, low: int, high: int) -> Any:
        """Return delivered rows [low, high) as an Arrow array."""
        return to_arrow(self.picked(low, high), self.type)


def gather(column: Column, at: int, out: Any) -> None:
    """Write delivered rows from ``at`` on to a contiguous ndarray, as many as it holds."""
    end = at + len(out)
    if column.take is None:
        out[...] = column.values[at:end]
    else:
        np.take(column.values, column.take[at:end], axis=0, out=out, mode="clip")


def columns_of(table: pa.Table, take: Ints | None) -> Iterator[tuple[str, Column]]:
    """Yield a table's columns by name, in the order of ``take`` (None: as they are)."""
    for name in table.column_names:
        yield name, _column(table.column(name), take)


def _column(chunks: Any, take: Ints | None) -> Column:
    array: Any = chunks.chunk(0) if chunks.num_chunks == 1 else chunks.combine_chunks()
    values = _numbers(array)
    if values is None:
        return Column(array if take is None else array.take(pa.array(take)), array.type)
    return Column(values, array.type, take)


def _numbers(array: Any) -> Any:
    """Return values as an ndarray of shape (rows, …), or None where that cannot be."""
    kind = array.type
    if array.null_count or not len(array):
        return None
    if is_number(kind):
        return flat(array)
    if isinstance(kind, pa.FixedShapeTensorType):
        return flat(array.storage.flatten()).reshape(len(array), *kind.shape)
    if pa.types.is_fixed_size_list(kind) and is_number(kind.value_type):
        size = kind.list_size  # flatten() would do, for ten times what a request's one row costs
        values = array.values.slice(array.offset * size, len(array) * size)
        return _rectangle(values, len(array), size)
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and is_number(kind.value_type):
        size = _one_length(array, 4 if pa.types.is_list(kind) else 8)
        return None if size is None else _rectangle(array.flatten(), len(array), size)
    if pa.types.is_binary(kind):
        return _bytes(array)
    return None


def is_number(kind: Any) -> bool:
    """Whether values of an Arrow type go into a tensor as they are."""
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def is_list(kind: Any) -> bool:
    """Whether an Arrow type is one of lists."""
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def flat(array: Any) -> Any:
    """Return numbers without nulls as an ndarray over Arrow's memory.

    Arrow's own ``to_numpy`` imports pandas at its first call: 0.2 s and 50 MB a process.
    """
    cast: Any = pc.cast
    kind = array.type
    if pa.types.is_boolean(kind):
        return flat(cast(array, pa.uint8())).view(np.bool_)
    width = kind.bit_width // 8
    letter = "f" if pa.types.is_floating(kind) else "u" if "uint" in str(kind) else "i"
    values = np.frombuffer(array.buffers()[1] or b"", np.dtype(f"{letter}{width}"))
    return values[array.offset : array.offset + len(array)]


def _rectangle(values: Any, rows: int, size: int) -> Any:
    if values.null_count or not size:
        return None
    return flat(values).reshape(rows, size)


def _one_length(array: Any, width: int) -> int | None:
    """Return the length that all values have, or None."""
    offsets = np.frombuffer(array.buffers()[1], np.int32 if width == 4 else np.int64)
    lengths = np.diff(offsets[array.offset : array.offset + len(array) + 1])
    return int(lengths[0]) if (lengths == lengths[0]).all() else None


def _bytes(array: Any) -> Any:
    size = _one_length(array, 4)
    if not size:
        return None
    offsets = np.frombuffer(array.buffers()[1], np.int32)
    first = int(offsets[array.offset])
    data = np.frombuffer(array.buffers()[2], np.uint8)
    return data[first : first + size * len(array)].reshape(len(array), size)


def to_arrow(values: Values, kind: Any) -> Any:
    """Return values of a column of Arrow type ``kind`` as an Arrow array."""
    make: Any = pa.array
    if _is_arrow(values):
        return values
    if not len(values):
        return _no_values(kind)
    if is_number(kind):
        return make(values, type=kind)
    if isinstance(kind, pa.FixedShapeTensorType):
        return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))
    rows, size = values.shape
    flat = np.ascontiguousarray(values).reshape(-1)
    if pa.types.is_fixed_size_list(kind):
        fixed: Any = pa.FixedSizeListArray.from_arrays
        return fixed(make(flat, type=kind.value_type), type=kind)
    wide = pa.types.is_large_list(kind)
    offsets = np.arange(0, flat.size + 1, size, dtype=np.int64 if wide else np.int32)
    if pa.types.is_binary(kind):
        buffer: Any = pa.py_buffer
        return pa.Array.from_buffers(kind, rows, [None, buffer(offsets), buffer(flat)])
    lists: Any = pa.LargeListArray.from_arrays if wide else pa.ListArray.from_arrays
    return lists(make(offsets), make(flat, type=kind.value_type), type=kind)


def joined(spans: Sequence[Span]) -> Values:
    """Return spans end to end: an ndarray where all have one form, else an Arrow array."""
    forms = {column.form for column, _, _ in spans}
    kind = spans[0][0].type
    if len(forms) == 1 and None not in forms:
        parts = [column.picked(low, high) for column, low, high in spans]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return to_arrow(whole, kind) if pa.types.is_binary(kind) else whole
    if len(spans) == 1:
        return spans[0][0].picked(*spans[0][1:])
    return pa.concat_arrays([column.arrow(low, high) for column, low, high in spans])


def sealed(values: Any, kind: Any) -> Any:
    """Return batches as they are delivered: binary values as Arrow, also where of one length.

    Args:
        values: an ndarray of shape (steps, rows, …).
        kind: the Arrow type.
    """
    return [to_arrow(one, kind) for one in values] if pa.types.is_binary(kind) else values


def without_rows(values: Values, kind: Any) -> Values:
    """Return values of a column of Arrow type ``kind`` less their rows, in memory of its own."""
    if _is_arrow(values):
        return _no_values(kind)
    return np.empty((0, *values.shape[1:]), values.dtype)


def _no_values(kind: Any) -> Any:
    make: Any = pa.array
    if not isinstance(kind, pa.BaseExtensionType):
        return make([], type=kind)
    return pa.ExtensionArray.from_storage(kind, make([], type=kind.storage_type))


def _is_arrow(values: Any) -> bool:
    return isinstance(values, pa.Array)
