"""The order of rows along a Z curve: rows that are near in several columns come near each other.

Pure. A column's values count by their ranks, so that a skewed column has as much say as an even
one; the bits of the ranks are interleaved, the first column's highest bit first (G. M. Morton,
1966). NULL comes after every value.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from lepton.errors import LakeError

pc: Any = pyarrow.compute  # its stubs know no arrays of unknown type

_BITS = 62
Curve = np.ndarray[Any, np.dtype[np.int64]]


def curve_of(columns: pa.Table) -> Curve:
    """Return each row's place along the curve of all columns; ties are rows of one cell.

    Raises:
        LakeError: a column's values have no order.
    """
    names = columns.column_names[:_BITS]
    count, bits = len(names), _BITS // len(names)
    cells = [_cells(columns[name], name, bits) for name in names]
    curve = np.zeros(len(columns), np.int64)
    for bit in range(bits):
        for at, cell in enumerate(cells):
            curve |= ((cell >> bit) & 1) << (bit * count + count - 1 - at)
    return curve


def _cells(column: Any, name: str, bits: int) -> Curve:
    """A column's ranks, spread over as many cells as the bits count."""
    kind = column.type
    if pa.types.is_nested(kind):
        raise LakeError(f"column {name} is {kind}, which has no order to sort by")
    if pa.types.is_boolean(kind):
        column = column.cast(pa.int8())
    ranks = _ranks(column)
    most = int(ranks.max(initial=0)) + 1
    if most <= 1 << bits:
        spread = (1 << bits) // most
        return ranks * spread
    return (ranks.astype(np.float64) * ((1 << bits) / most)).astype(np.int64)


def _ranks(column: Any) -> Curve:
    ranks: Any = pc.rank(column, sort_keys="ascending", tiebreaker="dense")
    return ranks.to_numpy().astype(np.int64) - 1
