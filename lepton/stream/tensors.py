"""Columns to torch tensors, without a copy where the memory layouts agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lepton.errors import StreamError
from lepton.stream.columns import Values, columns_of, is_list, is_number

if TYPE_CHECKING:
    import torch

Batch = dict[str, Any]
"""Column name to tensor of shape (rows, …); columns that no tensor can hold stay Arrow arrays."""


def batch_of(columns: Mapping[str, Values] | pa.Table) -> Batch:
    """Return columns as tensors.

    Numbers and booleans become shape (rows,); lists of numbers of one length (rows, length);
    Arrow tensors (rows, …). Strings, binary, dates and the rest stay Arrow arrays.

    Raises:
        StreamError: a number column holds nulls, or a list column rows of different lengths.
    """
    if isinstance(columns, pa.Table):
        columns = {name: c.picked(0, len(columns)) for name, c in columns_of(columns, None)}
    return {name: _tensor(name, values) for name, values in columns.items()}


def _tensor(name: str, values: Values) -> Any:
    return _of_arrow(name, values) if isinstance(values, pa.Array) else _torch(values)


def _of_arrow(name: str, array: Any) -> Any:
    """Explain why numbers did not become an array; pass on what no tensor can hold."""
    kind = array.type
    if is_number(kind):
        _refuse_nulls(name, array)
        return _torch(array.to_numpy(zero_copy_only=False))
    if isinstance(kind, pa.FixedShapeTensorType):
        _refuse_nulls(name, array)
        return _torch(array.to_numpy_ndarray())
    if not is_list(kind) or not is_number(kind.value_type):
        return array
    _refuse_nulls(name, array)
    count: Any = pc.list_value_length
    lengths: Any = pc.min_max(count(array))
    fixed = kind.list_size if pa.types.is_fixed_size_list(kind) else 0
    low, high = lengths["min"].as_py() or fixed, lengths["max"].as_py() or fixed
    if low != high:
        raise StreamError(
            f"column {name!r} holds lists of {low} to {high} values, which no tensor can: give "
            "them one length with transform=, or take the batches as Arrow"
        )
    flat = array.flatten()
    _refuse_nulls(name, flat)
    return _torch(flat.to_numpy(zero_copy_only=False).reshape(len(array), high))


def _refuse_nulls(name: str, array: Any) -> None:
    if array.null_count:
        raise StreamError(
            f"column {name!r} holds {array.null_count} nulls in one batch, which a tensor cannot: "
            f"fill them (Preparation.fit(..., fill={{{name!r}: ...}})) or filter them "
            f"(where('{name} IS NOT NULL'))"
        )


def _torch(values: Any) -> torch.Tensor:
    import torch

    if not values.flags.writeable:  # torch wants to be able to write; Arrow memory must not be
        values = np.array(values)
    return torch.from_numpy(values)


@cache
def pinned() -> Callable[[int], Any] | None:
    """Return how to make page-locked memory where CUDA is there, so that copies can overlap."""
    import torch

    if not torch.cuda.is_available():
        return None
    return lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
