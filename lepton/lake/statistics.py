"""What a version's log says of its files: bounds for skipping, and a table for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from lepton.lake.fields import Field, nulls
from lepton.lake.log import DataFile, Version, load_version
from lepton.lake.skipping import Bounds, Truth, exact, from_statistics, judge

pc: Any = pyarrow.compute  # its stubs know no arrays of unknown type


def judge_files(version: Version, conditions: Sequence[str]) -> Truth | None:
    """Judge every file of a version by the conjunction of SQL conditions; None without any.

    An empty condition stands for one that is not known: it may be true, false or null.
    """
    import sqlglot
    from sqlglot import exp

    nodes = [sqlglot.parse_one(c) if c else exp.Null() for c in conditions]
    if not nodes or not version.files:
        return None
    wanted = {str(c.parts[0].name) for n in nodes for c in n.find_all(exp.Column)}
    columns = bounds_of(version, wanted)
    verdict = judge(nodes[0], columns, len(version.files))
    for node in nodes[1:]:
        verdict = verdict & judge(node, columns, len(version.files))
    return verdict


@lru_cache(maxsize=8)
def verdicts(
    uri: str, number: int, options: tuple[tuple[str, str], ...], conditions: tuple[str, ...]
) -> tuple[tuple[DataFile, ...], frozenset[str], frozenset[str]]:
    """Return the files that may match, their paths, and the paths of which every row matches."""
    version = load_version(uri, number, options)
    verdict = judge_files(version, conditions)
    if verdict is None:
        return version.files, frozenset(f.path for f in version.files), frozenset()
    may = tuple(version.files[i] for i in np.flatnonzero(verdict.true))
    every = np.flatnonzero(verdict.true & ~verdict.false & ~verdict.null)
    return may, frozenset(f.path for f in may), frozenset(version.files[i].path for i in every)


def bounds_of(version: Version, wanted: set[str]) -> dict[str, Bounds]:
    """Return what is known of the wanted columns and the fields inside them, by NUL-joined name."""
    found: dict[str, Bounds] = {}
    table = version.statistics
    for field in version.fields:
        if field.name not in wanted:
            continue
        if field.name in version.partition_columns:
            values = [f.partition.get(field.name) for f in version.files]
            found[field.name] = exact(pa.array(values, field.type))
        elif table is not None and "num_records" in table.column_names:
            for names, path, leaf in _leaves(field, (), ()):
                found["\0".join(names)] = _leaf_bounds(version, table, path, leaf)
    return found


def _leaves(
    field: Field, names: tuple[str, ...], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], Field]]:
    names, path = (*names, field.name), (*path, field.physical)
    if not field.children:
        yield names, path, field
    elif pa.types.is_struct(field.type):
        for child in field.children:
            yield from _leaves(child, names, path)


def _leaf_bounds(version: Version, table: pa.Table, path: tuple[str, ...], leaf: Field) -> Bounds:
    count = _member(table, "null_count", path, pa.int64()) if len(path) == 1 else None
    return from_statistics(
        _member(table, "min", path, leaf.type),
        _member(table, "max", path, leaf.type),
        count,
        table["num_records"].combine_chunks(),
        widened=version.widened,
    )


def _member(table: pa.Table, column: str, path: tuple[str, ...], kind: pa.DataType) -> Any:
    """One statistic of one leaf, a value a file; nulls where the log has none of that type."""
    unknown: Any = nulls(len(table), kind)
    if column not in table.column_names:
        return unknown
    value: Any = table[column].combine_chunks()
    for name in path:
        kind_of: Any = value.type
        if not pa.types.is_struct(kind_of) or kind_of.get_field_index(name) < 0:
            return unknown
        value = pc.struct_field(value, [kind_of.get_field_index(name)])
    return value if value.type == kind else unknown


def statistics_of(version: Version) -> pa.Table:
    """Return one row a file: path, rows, bytes, partition values, and statistics by column.

    Structs ``min``, ``max`` and ``null_count`` hold the top-level columns under their logical
    names, as the log has them (writers may truncate strings and timestamps).
    """
    table: Any = version.statistics
    rows = (
        table["num_records"]
        if "num_records" in table.column_names
        else nulls(len(table), pa.int64())
    )
    schema: Any = version.schema
    partition: list[Any] = [
        pa.array([f.partition.get(c) for f in version.files], schema.field(c).type)
        for c in version.partition_columns
    ]
    stored = [f for f in version.fields if f.name not in version.partition_columns]
    make: Any = pa.StructArray.from_arrays
    out: dict[str, Any] = {"path": table["path"], "rows": rows, "bytes": table["size_bytes"]}
    out |= {f"partition.{c}": v for c, v in zip(version.partition_columns, partition, strict=True)}
    for statistic in ("min", "max", "null_count"):
        leaves = [f for f in stored if not f.children]
        kind = {f.name: pa.int64() if statistic == "null_count" else f.type for f in leaves}
        members = [_member(table, statistic, (f.physical,), kind[f.name]) for f in leaves]
        if leaves:
            out[statistic] = make(members, [f.name for f in leaves])
    return pa.table(out)


def sizes_of(version: Version) -> dict[str, int]:
    """Return each file's stored bytes, by path, as the log says."""
    table = version.statistics
    if table is None:
        return {}
    paths: Any = table["path"].to_pylist()
    sizes: Any = table["size_bytes"].to_pylist()
    return dict(zip(paths, sizes, strict=True))
