"""Tables with mapped columns and with deletion vectors, which writers for Delta seldom offer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.conformance_log import (
    Log,
    array_of,
    column,
    map_of,
    metadata,
    numbered,
    protocol,
    removed,
    struct_of,
    without,
)
from benchmarks.conformance_tables import Made, Rows, made, table_of

I32, I64, STR, F64 = pa.int32(), pa.int64(), pa.string(), pa.float64()


@made("mapping")
def mapping_name_nested(root: Path) -> Made:
    """Physical names at every level; the older file lacks a member that came later."""
    log = Log(root)
    inner = {n: (f"x{n}", f"y{n}", 10 * n) for n in (1, 2, 3)}

    def logical(n: int) -> Any:
        x, y, number = inner[n]
        return struct_of(column("x", "long", x, number), column("new", "string", y, number + 1))

    columns = [
        column("s", logical(1), "c1", 1),
        column("l", array_of(logical(2)), "c2", 2),
        column("m", map_of("string", logical(3)), "c3", 3),
        column("strange, {name};", "long", "c4", 4),
    ]

    def rows(value: tuple[Any, ...] | None, last: int, *, grown: bool = True) -> pa.Table:
        kinds: list[Any] = []
        values: list[Any] = []
        for x, y, number in inner.values():
            members = [numbered(x, I64, number), numbered(y, STR, number + 1)][: 1 + grown]
            kinds.append(pa.struct(members))
            values.append(value and dict(zip((x, y), value, strict=False)))
        whole = [kinds[0], pa.list_(kinds[1]), pa.map_(STR, kinds[2]), I64]
        schema = pa.schema([numbered(f"c{n}", k, n) for n, k in enumerate(whole, 1)])
        lists = [values[1]], [("k", values[2])]
        row = [values[0], *(lists if value else (None, None)), last]
        return pa.table([[v] for v in row], schema=schema)

    features = protocol(["columnMapping"])
    mode = metadata(columns, columnMapping_mode="name", columnMapping_maxColumnId="31")
    log.commit(
        features,
        mode,
        log.add("1.parquet", rows((1,), 10, grown=False)),
        log.add("2.parquet", rows((2, "n"), 20)),
        log.add("3.parquet", rows(None, 30)),
    )
    one, two = {"x": 1, "new": None}, {"x": 2, "new": "n"}
    name = "strange, {name};"
    found: Rows = [{"s": v, "l": [v], "m": [("k", v)]} for v in (one, two)]
    found.append({"s": None, "l": None, "m": None})
    expected = [row | {name: 10 * n} for n, row in enumerate(found, 1)]
    return Made(feature="column mapping by name, nested, evolved", rows=expected)


@made("mapping")
def mapping_id_nested(root: Path) -> Made:
    """Files are matched by field id; their names tell nothing, or mislead."""
    log = Log(root)
    columns = [
        column("a", "long", "p1", 1),
        column("b", struct_of(column("x", "string", "p3", 3)), "p2", 2),
        column("c", "long", "p4", 4),
    ]
    member = pa.struct([numbered("whatever", STR, 3)])
    mixed = pa.schema([numbered("p4", I64, 1), numbered("q", member, 2), numbered("p1", I64, 4)])
    short = pa.schema([numbered("p1", I64, 4), numbered("p4", I64, 1)])
    log.commit(
        protocol(["columnMapping"]),
        metadata(columns, columnMapping_mode="id", columnMapping_maxColumnId="4"),
        log.add("1.parquet", pa.table([[1], [{"whatever": "u"}], [3]], schema=mixed)),
        log.add("2.parquet", pa.table([[6], [5]], schema=short)),
    )
    expected: Rows = [{"a": 1, "b": {"x": "u"}, "c": 3}, {"a": 5, "b": None, "c": 6}]
    return Made(
        feature="column mapping by id, nested, misleading names",
        rows=expected,
        where=((("a", "=", 5), expected[1:]),),
    )


@made("mapping")
def mapping_renamed_and_dropped(root: Path) -> Made:
    """A column renamed, another dropped and added again under its old name."""
    log = Log(root)
    before = [column("k", "long", "k", 1), column("v", "long", "v", 2)]
    after = [column("key", "long", "k", 1), column("v", "long", "col-9", 3)]
    mode = {"columnMapping_mode": "name", "columnMapping_maxColumnId": "3"}
    stats = {"minValues": {"k": 1, "v": 7}, "maxValues": {"k": 1, "v": 7}}
    key, value, again = numbered("k", I64, 1), numbered("v", I64, 2), numbered("col-9", I64, 3)
    old = pa.table([[1], [7]], schema=pa.schema([key, value]))
    add = log.add("1.parquet", old, stats=stats)
    log.commit(protocol(reader=2, writer=5), metadata(before, **mode), add)
    new = pa.table([[2], [8]], schema=pa.schema([key, again]))
    log.commit(metadata(after, **mode), log.add("2.parquet", new))
    expected: Rows = [{"key": 1, "v": None}, {"key": 2, "v": 8}]
    return Made(
        feature="column mapping by name, reader version 2, renamed, dropped, added again",
        rows=expected,
        where=((("key", "=", 1), expected[:1]), (("v", "null", None), expected[:1])),
    )


@made("mapping")
def mapping_partitioned(root: Path) -> Made:
    """Partition values are keyed by physical name."""
    log = Log(root)
    columns = [column("p", "string", "col-1", 1), column("x", "long", "col-2", 2)]
    stored = pa.schema([numbered("col-2", I64, 2)])
    log.commit(
        protocol(["columnMapping"]),
        metadata(columns, ["p"], columnMapping_mode="name", columnMapping_maxColumnId="2"),
        log.add("1.parquet", pa.table([[1]], schema=stored), {"col-1": "u"}),
        log.add("2.parquet", pa.table([[2]], schema=stored), {"col-1": None}),
    )
    expected: Rows = [{"p": "u", "x": 1}, {"p": None, "x": 2}]
    where = ((("p", "=", "u"), expected[:1]), (("p", "null", None), expected[1:]))
    return Made(feature="column mapping by name, partitioned", rows=expected, where=where)


@made("deletions")
def deletions_inline(root: Path) -> Made:
    """Rows deleted across row groups; a file of which every row is; one replaced vector."""
    log = Log(root)
    some = log.add(
        "1.parquet",
        table_of({"x": I64}, x=list(range(10))),
        stats={"minValues": {"x": 0}, "maxValues": {"x": 9}, "nullCount": {"x": 0}},
        row_group_size=4,
    )
    every = log.add("2.parquet", table_of({"x": I64}, x=[90, 91]), stats={})
    columns = metadata([column("x", "long")], enableDeletionVectors="true")
    log.commit(protocol(["deletionVectors"]), columns, without(some, [0, 3]), every)
    log.commit(removed(without(some, [0, 3])), without(some, [0, 3, 4, 8]))
    log.commit(removed(every), without(every, [0, 1]))
    expected: Rows = [{"x": x} for x in (1, 2, 5, 6, 7, 9)]
    where = ((("x", ">", 6), expected[4:]), (("x", "=", 8), []))
    return Made(
        feature="deletion vectors, inline, replaced", rows=expected, where=where, count=True
    )


@made("deletions")
def deletions_mapped_partitioned(root: Path) -> Made:
    """A deletion vector on a file with mapped columns, of which one is missing."""
    log = Log(root)
    columns = [column(n, "long", f"c{i}", i) for i, n in enumerate("pxy", 1)]
    stored = pa.table([[1, 2, 3]], schema=pa.schema([numbered("c2", I64, 2)]))
    file = log.add("1.parquet", stored, {"c1": "5"}, stats={})
    log.commit(
        protocol(["deletionVectors", "columnMapping"]),
        metadata(columns, ["p"], columnMapping_mode="name", columnMapping_maxColumnId="3"),
        without(file, [1]),
    )
    expected: Rows = [{"p": 5, "x": x, "y": None} for x in (1, 3)]
    return Made(feature="deletion vectors, mapped, partitioned, evolved", rows=expected, count=True)
