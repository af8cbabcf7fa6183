"""Rows as the files of a table with column mapping store them (Delta protocol, "Column Mapping").

Pure. The other way round than reading: a column, and every field inside it, goes under its
physical name and with its id, whichever of both readers go by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from lepton.lake.fields import Field, convert, fields_of


def storing(schema_json: str) -> tuple[Field, ...]:
    """Return a mapped table's columns with names and physical names in each other's place."""
    return tuple(_turned(f) for f in fields_of(schema_json, "id"))


def stored(rows: pa.Table, fields: Sequence[Field]) -> pa.Table:
    """Return rows under physical names, with ids; a column that is none of the fields stays.

    Args:
        rows: of some or all of the table's columns.
        fields: as :func:`storing` gives them.
    """
    if not fields:
        return rows
    ways = {f.physical: f for f in fields}
    given: Any = rows.schema
    kept: list[Any] = [ways[f.name].arrow() if f.name in ways else f for f in given]
    join: Any = pa.chunked_array
    columns = [
        join([convert(c, ways[name]) for c in rows[name].chunks], ways[name].type)
        if name in ways
        else rows[name]
        for name in rows.column_names
    ]
    return pa.table(columns, schema=pa.schema(kept))


def stored_partition(
    partition: Mapping[str, str | None], fields: Sequence[Field]
) -> dict[str, str | None]:
    """Return partition values under physical names."""
    names = {f.physical: f.name for f in fields}
    return {names.get(k, k): v for k, v in partition.items()}


def _turned(field: Field) -> Field:
    children = tuple(_turned(c) for c in field.children)
    inside: list[Any] = [c.arrow() for c in children]
    kind: Any = field.type
    if pa.types.is_struct(kind):
        kind = pa.struct(inside)
    elif pa.types.is_map(kind):
        make: Any = pa.map_
        kind = make(*inside)
    elif pa.types.is_list(kind):
        kind = pa.list_(inside[0])
    return replace(
        field,
        name=field.physical,
        physical=field.name,
        id=None,
        tag=field.id,
        type=kind,
        children=children,
        comment=None,
    )
