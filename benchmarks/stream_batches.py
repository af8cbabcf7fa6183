"""Arrow rows as torch batches, and the consumer that every peer feeds.

A batch is a dict of tensors: numbers of shape (rows,), images uint8 (rows, 3072), vectors float32
(rows, 768). The consumer reads every byte of every column and adds it up as 64-bit integers modulo
2**64: cheap, exact and the same in any order, so two peers that delivered the same rows have the
same sums.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch

BATCH = 4096
Batch = dict[str, torch.Tensor]

warnings.filterwarnings("ignore", message="The given NumPy array is not writ")


def rebatch(tables: Iterable[pa.Table], size: int = BATCH) -> Iterator[pa.Table]:
    """Cut a run of tables into tables of ``size`` rows; the last may be shorter."""
    rest: pa.Table | None = None
    for table in tables:
        rows = table
        if rest is not None and len(rest):
            need = size - len(rest)
            joined = pa.concat_tables([rest, rows.slice(0, need)])
            if len(joined) < size:
                rest = joined
                continue
            yield joined
            rows = rows.slice(need)
        full = len(rows) // size * size
        for at in range(0, full, size):
            yield rows.slice(at, size)
        rest = rows.slice(full)
    if rest is not None and len(rest):
        yield rest


def tensors(table: pa.Table) -> Batch:
    """Return the columns of a table as tensors, without a copy where they lie in one piece."""
    return {name: tensor(table.column(name)) for name in table.column_names}


def tensor(column: Any) -> torch.Tensor:
    """Return a column as a tensor; equally long binary values become uint8 (rows, length)."""
    if isinstance(column, torch.Tensor):
        return column
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
    kind = column.type
    if isinstance(kind, pa.ExtensionType):
        column, kind = column.storage, kind.storage_type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return torch.from_numpy(_bytes(column))
    if pa.types.is_fixed_size_binary(kind):
        begin, end = (
            column.offset * kind.byte_width,
            (column.offset + len(column)) * kind.byte_width,
        )
        flat = np.frombuffer(column.buffers()[1], np.uint8)[begin:end]
        return torch.from_numpy(flat.reshape(len(column), kind.byte_width))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        flat = column.flatten().to_numpy(zero_copy_only=False)
        return torch.from_numpy(flat.reshape(len(column), -1))
    return torch.from_numpy(column.to_numpy(zero_copy_only=False))


def _bytes(column: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """View a binary column whose values have one length as (rows, length)."""
    offset = np.int32 if pa.types.is_binary(column.type) else np.int64
    ends = np.frombuffer(column.buffers()[1], offset)[
        column.offset : column.offset + len(column) + 1
    ]
    lengths = np.diff(ends)
    if len(lengths) and (lengths != lengths[0]).any():
        raise ValueError("binary values of several lengths cannot be one tensor")
    flat = np.frombuffer(column.buffers()[2], np.uint8)[ends[0] : ends[-1]]
    return flat.reshape(len(column), -1)


def checksum(values: torch.Tensor) -> int:
    """Return the sum of a tensor's bytes taken as int64 (of its values, if these are narrower)."""
    wide = values.itemsize * (values.shape[-1] if values.dim() > 1 else 1) % 8 == 0
    if values.itemsize == 8 or (wide and values.dim() > 1):
        values = values.contiguous().view(torch.int64)
    return int(values.sum(dtype=torch.int64)) % 2**64


class Consumer:
    """Takes batches, touches every byte, and remembers what it was given."""

    def __init__(self) -> None:
        self.rows = 0
        self.batches = 0
        self.sums: dict[str, int] = {}
        self.kinds: dict[str, str] = {}

    def take(self, batch: Batch) -> None:
        """Add a batch up."""
        for name, values in batch.items():
            self.sums[name] = (self.sums.get(name, 0) + checksum(values)) % 2**64
        if not self.batches:
            self.kinds = {name: str(values.dtype) for name, values in batch.items()}
        self.rows += len(next(iter(batch.values())))
        self.batches += 1
