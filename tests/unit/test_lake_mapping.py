"""Tables whose columns are stored under other names are written as they are read."""

import datetime as dt
import json
import shutil
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, QueryBuilder

import lepton
from benchmarks.conformance_log import (
    Log,
    array_of,
    column,
    map_of,
    metadata,
    protocol,
    struct_of,
    widened,
)
from lepton.errors import LakeError, WriteConflict
from lepton.lake.evolution import evolution
from lepton.lake.growth import add_columns
from lepton.lake.maintenance import optimize
from lepton.lake.read import unchecked_files
from lepton.lake.rules import rules_of

DATA = Path(__file__).parents[1] / "data" / "delta-tables"


def inside(n: int) -> dict[str, Any]:
    ab, cd = (f"i-{n}", n), (f"i-{n + 1}", n + 1)
    return struct_of(column("a b", "long", *ab), column("c,d", array_of("string"), *cd))


COLUMNS = [
    column("the key", "long", "p-1", 1),
    column("s;t", inside(20), "p-2", 2),
    column("m", map_of("string", inside(30)), "p-3", 3),
    column("l", array_of(inside(40)), "p-4", 4),
    column("the part", "string", "p-5", 5),
]


def made(root: Path, mode: str, **configuration: str) -> Path:
    log = Log(root)
    more = {"columnMapping_mode": mode, "columnMapping_maxColumnId": "50", **configuration}
    features = ["columnMapping", "changeDataFeed"] if configuration else ["columnMapping"]
    asks = protocol(features)
    asks["protocol"]["readerFeatures"] = ["columnMapping"]
    log.commit(asks, metadata(COLUMNS, ["the part"], **more))
    return root


def row(key: int, part: str | None = "x/y", inner: int | None = 7) -> dict[str, Any]:
    one = {"a b": inner, "c,d": ["q", None]}
    return {
        "the key": key,
        "s;t": one if inner is not None else None,
        "m": [("one", one), ("two", None)],
        "l": [one, None] if inner is not None else None,
        "the part": part,
    }


def shown(rows: list[dict[str, Any]]) -> list[str]:
    return sorted(map(repr, rows))


def table_of(uri: Path, rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=lepton.table(uri).schema)


@pytest.mark.parametrize("mode", ["name", "id"])
def test_every_mode_of_writing_reads_back_and_is_stored_physically(
    tmp_path: Path, mode: str
) -> None:
    uri = made(tmp_path / "t", mode)
    lepton.write(table_of(uri, [row(1), row(2, None), row(3, "é%", None)]), uri)
    lepton.write(table_of(uri, [row(2, "moved", 8), row(4)]), uri, mode="merge", key="the key")
    keys = pa.table({"the key": [1]})
    table = lepton.write(keys, uri, mode="delete", key="the key")

    expected = [row(2, "moved", 8), row(3, "é%", None), row(4)]
    assert shown(table.to_arrow().to_pylist()) == shown(expected)
    assert unchecked_files(table.load()) == ()
    (skipped,) = table.where('"the key" = 3').files()
    names = pq.read_schema(uri / skipped.path)
    assert names.names == ["p-1", "p-2", "p-3", "p-4"]
    assert [names.field(n).metadata[b"PARQUET:field_id"] for n in names.names] == [
        *(b"1", b"2", b"3", b"4")
    ]
    members: Any = names.field("p-4").type.value_field.type
    assert [(f.name, f.metadata[b"PARQUET:field_id"]) for f in members] == [
        ("i-40", b"40"),
        ("i-41", b"41"),
    ]
    told = QueryBuilder().register("t", DeltaTable(uri)).execute('SELECT "the key" FROM t')
    assert sorted(told.read_all()["the key"].to_pylist()) == [2, 3, 4]
    before = shown(table.to_arrow().to_pylist())
    optimize(uri, zorder=["the key"])
    assert shown(lepton.table(uri).to_arrow().to_pylist()) == before
    last = lepton.write(table_of(uri, [row(9)]), uri, mode="overwrite")
    assert last.to_arrow().to_pylist() == [row(9)]


def test_the_feed_of_a_mapped_table_has_its_names(tmp_path: Path) -> None:
    uri = made(tmp_path / "t", "name", enableChangeDataFeed="true")
    lepton.write(table_of(uri, [row(1), row(2)]), uri)
    lepton.write(table_of(uri, [row(2, None), row(3)]), uri, mode="merge", key="the key")
    told = lepton.table(uri).changes(1).to_pylist()
    assert {(r["_change_type"], r["the key"], r["the part"]) for r in told} == {
        ("insert", 3, "x/y"),
        ("update_postimage", 2, None),
        ("update_preimage", 2, "x/y"),
    }
    assert [r["s;t"] for r in told] == [row(1)["s;t"]] * 3


@pytest.mark.parametrize(
    "name",
    [
        "table-with-columnmapping-mode-name",
        "table-with-columnmapping-mode-id",
        "dv-with-columnmapping",
    ],
)
def test_tables_that_spark_made_take_their_own_rows_again(tmp_path: Path, name: str) -> None:
    uri = shutil.copytree(DATA / name / "table", tmp_path / "t")
    table = lepton.table(uri)
    rows = table.to_arrow()
    again = lepton.write(rows.slice(0, 1), uri).to_arrow()
    assert shown(again.to_pylist()) == shown([*rows.to_pylist(), rows.to_pylist()[0]])
    assert shown(lepton.write(rows, uri, mode="overwrite").to_arrow().to_pylist()) == shown(
        rows.to_pylist()
    )


def test_widened_columns_take_wide_values_and_old_files_stay(tmp_path: Path) -> None:
    log = Log(tmp_path / "t")
    narrow = pa.table(
        {
            "k": pa.array([1, 2], pa.int32()),
            "d": pa.array([dt.date(1969, 12, 31), None]),
            "m": pa.array([Decimal("1.1"), None], pa.decimal128(4, 1)),
        }
    )
    columns = [
        widened("k", "integer", "long"),
        widened("d", "date", "timestamp_ntz"),
        widened("m", "decimal(4,1)", "decimal(12,3)"),
    ]
    stats = {"minValues": {"k": 1, "d": "1969-12-31"}, "maxValues": {"k": 2, "d": "1969-12-31"}}
    add = log.add("a.parquet", narrow, stats=stats)
    log.commit(protocol(["typeWidening", "timestampNtz"]), metadata(columns), add)
    table = lepton.table(log.root)
    assert table.where("d = '1969-12-31 00:00:00'").to_arrow()["k"].to_pylist() == [1]
    wide = {"k": 2**40, "d": dt.datetime(1960, 1, 1, 12), "m": Decimal("123456789.123")}
    rows = pa.Table.from_pylist([wide, {**wide, "k": 2}], schema=table.schema)
    merged = lepton.write(rows, log.root, mode="merge", key="k")
    old = {"k": 1, "d": dt.datetime(1969, 12, 31), "m": Decimal("1.100")}
    assert shown(merged.to_arrow().to_pylist()) == shown([old, *rows.to_pylist()])
    assert merged.where("d < '1965-01-01'").count_rows() == 2


def test_commits_carry_times_that_ascend_where_the_table_asks(tmp_path: Path) -> None:
    log = Log(tmp_path / "t")
    asks = protocol(["inCommitTimestamp"])
    asks["protocol"]["readerFeatures"] = []
    log.commit(asks, metadata([column("x", "long")], enableInCommitTimestamps="true"))
    first = log.root / "_delta_log" / f"{0:020}.json"
    ahead = 4_000_000_000_000
    first.write_text(
        first.read_text().replace('"operation"', f'"inCommitTimestamp": {ahead}, "operation"', 1)
    )
    for n in range(2):
        lepton.write(pa.table({"x": [n]}), log.root)
    times = [c.metadata["inCommitTimestamp"] for c in lepton.table(log.root).history()]
    assert times == [ahead + 2, ahead + 1, ahead]
    at = dt.datetime.fromtimestamp((ahead + 1) / 1000, dt.UTC)
    assert lepton.table(log.root, version=at).version == 1


def mapping_of(uri: Path) -> dict[str, Any]:
    """Ids and physical names of a table's fields, nested ones too, by the names' path."""
    found: dict[str, Any] = {}

    def walk(path: str, kind: Any) -> None:
        for member in kind["fields"] if kind["type"] == "struct" else ():
            told, name = member["metadata"], f"{path}{member['name']}"
            found[name] = (
                told["delta.columnMapping.id"],
                told["delta.columnMapping.physicalName"],
            )
            inside = member["type"]
            while isinstance(inside, dict) and inside["type"] != "struct":
                inside = inside.get("elementType") or inside["valueType"]
            if isinstance(inside, dict):
                walk(f"{name}/", inside)

    walk("", json.loads(DeltaTable(uri).schema().to_json()))
    return found


GROUP = pa.struct({"x": pa.int64(), "y": pa.list_(pa.struct({"z": pa.string()}))})


def grown(uri: Path, key: int) -> pa.Table:
    more = {"note": f"n{key}", "group": {"x": key, "y": [{"z": "deep"}, None]}}
    schema: Any = lepton.table(uri).schema
    fields = [f for f in schema if f.name not in more]
    fields += [pa.field("note", pa.string()), pa.field("group", GROUP)]
    return pa.Table.from_pylist([row(key) | more], pa.schema(fields))


@pytest.mark.parametrize("mode", ["name", "id"])
@pytest.mark.parametrize("feed", [{}, {"enableChangeDataFeed": "true"}])
def test_a_mapped_table_gets_columns_with_ids_of_their_own(
    tmp_path: Path, mode: str, feed: dict[str, str]
) -> None:
    uri = made(tmp_path / "t", mode, **feed)
    lepton.write(table_of(uri, [row(1)]), uri)
    before = mapping_of(uri)
    given = grown(uri, 2)
    table = lepton.write(given, uri, evolve="add", txn=("job", 1))
    lepton.write(given, uri, evolve="add", txn=("job", 1))
    after = mapping_of(uri)
    new = {k: v for k, v in after.items() if k not in before}

    assert {k: after[k] for k in before} == before
    assert [n for n, _ in new.values()] == [51, 52, 53, 54, 55]
    assert list(new) == ["note", "group", "group/x", "group/y", "group/y/z"]
    assert len({p for _, p in after.values()}) == len(after)
    properties = DeltaTable(uri).metadata().configuration
    assert properties["delta.columnMapping.maxColumnId"] == "55"
    old = row(1) | {"note": None, "group": None}
    assert shown(table.to_arrow().to_pylist()) == shown([old, *given.to_pylist()])
    assert table.where("note = 'n2'").count_rows() == 1
    assert lepton.table(uri).version == table.version
    merged = lepton.write(grown(uri, 1), uri, mode="merge", key="the key").to_arrow()
    assert sorted(merged["note"].to_pylist()) == ["n1", "n2"]
    names = QueryBuilder().register("t", DeltaTable(uri)).execute("SELECT note FROM t")
    assert sorted(names.read_all()["note"].to_pylist()) == ["n1", "n2"]
    last = lepton.write(grown(uri, 5), uri, mode="overwrite", evolve="add")
    assert last.to_arrow().to_pylist() == grown(uri, 5).to_pylist()


def test_writers_that_add_to_a_mapped_table_at_once_agree_or_conflict(tmp_path: Path) -> None:
    uri = made(tmp_path / "t", "name")
    path, stale = str(uri), DeltaTable(uri)
    rules = rules_of(stale, path)
    new = evolution(rules.schema, grown(uri, 2).schema, "add")
    other = evolution(rules.schema, pa.schema({"odd": pa.int64()}), "add")
    first = add_columns(stale, rules, new, [], uri=path, options=None)[1]
    again = add_columns(DeltaTable(uri, version=0), rules, new, [], uri=path, options=None)[1]

    assert replace(first, what="") == replace(again, what="")
    assert DeltaTable(uri).version() == 1
    with pytest.raises(WriteConflict, match="commit 1"):
        add_columns(DeltaTable(uri, version=0), rules, other, [], uri=path, options=None)


def test_a_table_of_widened_columns_keeps_their_story_when_it_grows(tmp_path: Path) -> None:
    log = Log(tmp_path / "t")
    asks = protocol(["typeWidening", "inCommitTimestamp"])
    asks["protocol"]["readerFeatures"] = ["typeWidening"]
    columns = [widened("k", "integer", "long")]
    add = log.add("a.parquet", pa.table({"k": pa.array([1], pa.int32())}), stats={})
    log.commit(asks, metadata(columns, enableInCommitTimestamps="true"), add)
    rows = pa.table({"k": [2**40], "new": ["x"]})
    table = lepton.write(rows, log.root, evolve="add")
    (spec, _) = json.loads(DeltaTable(log.root).schema().to_json())["fields"]

    assert spec == columns[0]
    assert shown(table.to_arrow().to_pylist()) == shown([{"k": 1, "new": None}, *rows.to_pylist()])
    stamps = [c.metadata["inCommitTimestamp"] for c in table.history()[:2]]
    assert stamps[0] > stamps[1]


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("mode", ["append", "overwrite"])
def test_types_become_wider_in_files_that_stay_where_the_table_lets_them(
    tmp_path: Path, mapped: bool, mode: Any
) -> None:
    log = Log(tmp_path / "t")
    asks = protocol(["typeWidening", *(["columnMapping"] if mapped else [])])
    names = [("c1", 1), ("c2", 2), ("c3", 3)] if mapped else [(None, None)] * 3
    columns = [column("k", "short", *names[0]), column("f", "float", *names[1])]
    columns += [column("d", "decimal(4,1)", *names[2])]
    how = {"columnMapping_mode": "name", "columnMapping_maxColumnId": "3"} if mapped else {}
    log.commit(asks, metadata(columns, enableTypeWidening="true", **how))
    uri, narrow, decimals = log.root, pa.decimal128(4, 1), pa.decimal128(12, 3)
    old = {"k": [1, 2], "f": pa.array([0.5, None], pa.float32())}
    lepton.write(pa.table({**old, "d": pa.array([Decimal("1.5")] * 2, narrow)}), uri)
    files = set(uri.glob("*.parquet"))
    far = pa.array([Decimal("12345678.125")], decimals)
    wide = pa.table({"k": [2**20], "f": [0.1], "d": far, "new": ["x"]})
    table = lepton.write(wide, uri, mode=mode, evolve="widen", txn=("job", 1))
    last = pa.table({"k": [2**40], "f": [0.1], "d": far, "new": ["y"]})
    lepton.write(wide, uri, mode=mode, evolve="widen", txn=("job", 1))
    rows = lepton.write(last, uri, evolve="widen").to_arrow()

    before = [
        {"k": n, "f": f, "d": Decimal("1.500"), "new": None} for n, f in ((1, 0.5), (2, None))
    ]
    expected = (before if mode == "append" else []) + wide.to_pylist() + last.to_pylist()
    assert shown(rows.to_pylist()) == shown(expected)
    assert [f.type for f in rows.schema] == [pa.int64(), pa.float64(), decimals, pa.string()]
    assert files < set(uri.glob("*.parquet"))
    story = json.loads(DeltaTable(uri).schema().to_json())["fields"][0]["metadata"]
    assert story["delta.typeChanges"] == [{"fromType": "short", "toType": "long"}]
    assert table.where("k > 1000000").count_rows() == 1
    assert lepton.table(uri).where("k = 2").count_rows() == (1 if mode == "append" else 0)
    with pytest.raises(LakeError, match="column k is int64"):
        lepton.write(pa.table({"k": ["no"], "f": [0.1], "d": far, "new": ["x"]}), uri)


def test_what_would_lose_the_schemas_parts_is_refused(tmp_path: Path) -> None:
    log = Log(tmp_path / "t")
    how = {"columnMapping_mode": "name", "columnMapping_maxColumnId": "1"}
    log.commit(protocol(["columnMapping"]), metadata([column("k", "integer", "p", 1)], **how))
    for mode in ("overwrite", "append"):
        with pytest.raises(LakeError, match=r"t'@0.*wider types would lose"):
            lepton.write(pa.table({"k": [2**40]}), log.root, evolve="rewrite", mode=mode)
    assert lepton.table(log.root).version == 0
