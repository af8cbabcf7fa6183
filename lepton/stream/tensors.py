"""Arrow columns to torch tensors, without a copy where the memory layouts agree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lepton.errors import StreamError

if TYPE_CHECKING:
    import torch

Batch = dict[str, Any]
"""Column name to tensor of shape (rows, …); columns that no tensor can hold stay Arrow arrays."""


def batch_of(table: pa.Table) -> Batch:
    """Return a table's columns as tensors.

    Numbers and booleans become shape (rows,); lists of numbers of one length (rows, length);
    Arrow tensors (rows, …). Strings, binary, dates and the rest stay Arrow arrays.

    Raises:
        StreamError: a number column holds nulls, or a list column rows of different lengths.
    """
    return {name: _tensor(name, table.column(name)) for name in table.column_names}


def _tensor(name: str, column: Any) -> Any:
    array: Any = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    kind = array.type
    if isinstance(kind, pa.FixedShapeTensorType):
        _refuse_nulls(name, array)
        return _torch(array.to_numpy_ndarray())
    if _is_list(kind) and _is_number(kind.value_type):
        _refuse_nulls(name, array)
        return _torch(_rectangle(name, array))
    if _is_number(kind):
        _refuse_nulls(name, array)
        return _torch(_numbers(array))
    return array


def _is_number(kind: Any) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _is_list(kind: Any) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _refuse_nulls(name: str, array: Any) -> None:
    if array.null_count:
        raise StreamError(
            f"column {name!r} holds {array.null_count} nulls in one batch, which a tensor cannot: "
            f"fill them (Preparation.fit(..., fill={{{name!r}: ...}})) or filter them "
            f"(where('{name} IS NOT NULL'))"
        )


def _rectangle(name: str, array: Any) -> Any:
    """The values of equally long lists, shape (rows, length)."""
    if pa.types.is_fixed_size_list(array.type):
        return _numbers(array.flatten()).reshape(len(array), array.type.list_size)
    count: Any = pc.list_value_length
    lengths: Any = pc.min_max(count(array))
    flat: Any = array.flatten()
    low, high = lengths["min"].as_py() or 0, lengths["max"].as_py() or 0
    if low != high:
        raise StreamError(
            f"column {name!r} holds lists of {low} to {high} values, which no tensor can: give "
            "them one length with transform=, or take the batches as Arrow"
        )
    _refuse_nulls(name, flat)
    return _numbers(flat).reshape(len(array), high)


def _numbers(array: Any) -> Any:
    return array.to_numpy(zero_copy_only=False)


def _torch(values: Any) -> torch.Tensor:
    import torch

    if not values.flags.writeable:  # torch wants to be able to write; Arrow memory must not be
        return torch.from_numpy(np.array(values))
    return torch.from_numpy(values)
