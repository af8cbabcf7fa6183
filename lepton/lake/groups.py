"""Which row groups of a data file cannot hold a matching row, by the file's own footer.

The same judgement as for whole files (:mod:`lepton.lake.skipping`): a doubt keeps a group. Only
columns that are not nested are judged; a column that the file does not have is null throughout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from lepton.lake.fields import Field, convert, locate, nulls
from lepton.lake.skipping import Bounds, Mask, exact, from_statistics, judge


def may_match(
    metadata: Any,
    stored: pa.Schema,
    fields: Sequence[Field],
    partition: Mapping[str, Any],
    conditions: Sequence[str],
) -> Mask:
    """Return for each row group whether some row may meet all conditions.

    Args:
        metadata: the file's ``pyarrow.parquet.FileMetaData``.
        stored: the Arrow schema of the file.
        fields: the table's columns.
        partition: the file's partition values, by logical name.
        conditions: SQL; an empty one stands for one that is not known.
    """
    import sqlglot
    from sqlglot import exp

    count = int(metadata.num_row_groups)
    may = np.ones(count, bool)
    nodes = [sqlglot.parse_one(c) for c in conditions if c]
    wanted = {str(c.parts[0].name) for n in nodes for c in n.find_all(exp.Column)}
    columns: dict[str, Bounds] = {}
    for field in fields:
        if field.name not in wanted or field.children:
            continue
        if field.name in partition:
            columns[field.name] = exact(pa.array([partition[field.name]] * count, field.type))
        elif (found := _bounds(metadata, stored, field)) is not None:
            columns[field.name] = found
    for node in nodes:
        may &= judge(node, columns, count).true
    return may


def _bounds(metadata: Any, stored: pa.Schema, field: Field) -> Bounds | None:
    count = int(metadata.num_row_groups)
    at = locate(field, stored)
    if at is None:
        none = nulls(count, field.type)
        return Bounds(low=none, high=none, nulls=np.ones(count, bool), values=np.zeros(count, bool))
    column: Any = stored.field(at)
    if count == 0 or "." in column.name:  # paths of columns are joined by dots
        return None
    groups = [metadata.row_group(g) for g in range(count)]
    paths = [groups[0].column(c).path_in_schema for c in range(groups[0].num_columns)]
    if column.name not in paths:
        return None
    place = paths.index(column.name)
    kept_as = str(groups[0].column(place).physical_type)
    if kept_as == "FIXED_LEN_BYTE_ARRAY" and str(metadata.created_by).startswith("parquet-mr"):
        return None  # some versions of it ordered the bytes of negative decimals wrongly
    found: list[Any] = [g.column(place).statistics for g in groups]
    try:
        low, high = (convert(_ends(found, end, column.type), field) for end in ("min", "max"))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, OverflowError):
        return None
    empty = [s.null_count if s is not None and s.has_null_count else None for s in found]
    rows = pa.array([g.num_rows for g in groups], pa.int64())
    return from_statistics(low, high, pa.array(empty, pa.int64()), rows)


def _ends(statistics: Sequence[Any], end: str, kind: pa.DataType) -> pa.Array[Any]:
    known = [s is not None and s.has_min_max for s in statistics]
    return pa.array(
        [getattr(s, end) if k else None for s, k in zip(statistics, known, strict=True)], kind
    )
