"""Logs that are odd or hostile: the rows that the protocol means, or a refusal that says why."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

import lepton
from benchmarks.conformance_log import Action, Log, column, metadata, protocol, removed, without
from lepton.errors import LakeError
from lepton.lake.log import load_version
from lepton.lake.maintenance import checkpoint, optimize, restore, vacuum


def ints(*values: int, name: str = "x") -> pa.Table:
    return pa.table({name: pa.array(values, pa.int64())})


def begun(
    root: Path,
    columns: list[Action] | None = None,
    partition: tuple[str, ...] = (),
    features: list[str] | None = None,
) -> Log:
    log = Log(root)
    asks = protocol(reader=1, writer=2) if features is None else protocol(features)
    log.commit(asks, metadata(columns or [column("x", "long")], partition))
    return log


def rows_of(root: Path, where: str | None = None) -> list[Any]:
    """The rows, or the only column's values, which the count agrees with."""
    load_version.cache_clear()
    snapshot = lepton.table(root)
    snapshot = snapshot if where is None else snapshot.where(where)
    found = snapshot.to_arrow()
    found.validate(full=True)
    assert snapshot.count_rows() == len(found)
    rows = found.to_pylist()
    return [r["x"] for r in rows] if found.column_names == ["x"] else rows


def one_file_named_twice(log: Log) -> list[int]:
    file = log.add("a.parquet", ints(1, 2))
    log.commit(file, file)
    log.commit(file)
    return [1, 2]


def a_vector_in_anothers_place(log: Log) -> list[int]:
    whole = log.add("a.parquet", ints(1, 2, 3), stats={})
    log.commit(whole)
    log.commit(removed(whole), first := without(whole, [0]))
    log.commit(without(whole, [0, 2]), removed(first))  # the order in a commit means nothing
    return [2]


def a_vector_that_takes_all(log: Log) -> list[int]:
    log.commit(without(log.add("a.parquet", ints(1, 2, 3), stats={}), [0, 1, 2]))
    return []


def a_file_that_comes_back(log: Log) -> list[int]:
    file = log.add("a.parquet", ints(1))
    log.commit(file)
    log.commit(removed(file))
    log.commit(file)
    return [1]


def a_file_removed_that_never_was(log: Log) -> list[int]:
    file = log.add("a.parquet", ints(1))
    log.commit(file, removed(log.add("b.parquet", ints(2))))
    return [1]


def no_groups_at_all(log: Log) -> list[int]:
    file = log.add("a.parquet", ints(1))
    with pq.ParquetWriter(log.root / "a.parquet", pa.schema({"x": pa.int64()})):
        pass
    log.commit(file, log.add("b.parquet", ints(), stats={}))
    return []


def strays_in_the_log(log: Log) -> list[int]:
    log.commit(log.add("a.parquet", ints(1)))
    folder = log.root / "_delta_log"
    for name in (
        f"{1:020}.crc",
        f".{2:020}.json.swp",
        f"{2:020}.json.tmp",
        f"{2:020}.JSON",
        f"{1:020}.checkpoint.parquet.tmp",
        "2.json",
        "notes.json",
    ):
        (folder / name).write_text("no JSON")
    for name in ("_commits", "_sidecars", f"{9:020}.json.d"):
        (folder / name).mkdir()
    return [1]


@pytest.mark.parametrize(
    "make",
    [
        one_file_named_twice,
        a_vector_in_anothers_place,
        a_vector_that_takes_all,
        a_file_that_comes_back,
        a_file_removed_that_never_was,
        no_groups_at_all,
        strays_in_the_log,
    ],
)
def test_what_comes_and_goes(tmp_path: Path, make: Callable[[Log], list[int]]) -> None:
    log = begun(tmp_path / "t", features=["deletionVectors"])
    assert rows_of(log.root) == []
    assert make(log) == rows_of(log.root) == rows_of(log.root, "x > 0")


@pytest.mark.parametrize("downgraded", [False, True])
def test_vectors_count_where_the_table_does_not_own_up_to_them(
    tmp_path: Path, downgraded: bool
) -> None:
    log = begun(tmp_path / "t", features=["deletionVectors"] if downgraded else None)
    log.commit(without(log.add("a.parquet", ints(1, 2, 3), stats={}), [0]))
    if downgraded:
        log.commit(protocol(reader=1, writer=2))
    assert rows_of(log.root) == [2, 3]
    assert rows_of(log.root, "x < 3") == [2]


CHANGES: dict[str, tuple[Callable[[Path], Any], list[int]]] = {
    "append": (lambda uri: lepton.write(ints(9), uri), [2, 3, 9]),
    "merge": (lambda uri: lepton.write(ints(2, 9), uri, mode="merge", key="x"), [2, 3, 9]),
    "delete": (lambda uri: lepton.write(ints(2), uri, mode="delete", key="x"), [3]),
    "replace": (
        lambda uri: lepton.write(ints(9), uri, mode="replace_where", where="x > 2"),
        [2, 9],
    ),
    "overwrite": (lambda uri: lepton.write(ints(9), uri, mode="overwrite"), [9]),
    "optimize": (lambda uri: (lepton.write(ints(9), uri), optimize(uri)), [2, 3, 9]),
    "restore": (
        lambda uri: (lepton.write(ints(9), uri, mode="overwrite"), restore(uri, 1)),
        [2, 3],
    ),
    "checkpoint": (checkpoint, [2, 3]),
    "vacuum": (lambda uri: vacuum(uri, dry_run=False), [2, 3]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_such_vectors_stay_applied_whatever_is_done(tmp_path: Path, name: str) -> None:
    log = begun(tmp_path / "t")
    log.commit(without(log.add("a.parquet", ints(1, 2, 3), stats={}), [0]))
    change, left = CHANGES[name]
    change(log.root)
    assert sorted(rows_of(log.root)) == left


LINES: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("carriage returns", lambda b: b.replace(b"\n", b"\r\n")),
    ("blank lines", lambda b: b"\n\n" + b.replace(b"\n", b"\n\n")),
    ("no end of line", lambda b: b.rstrip(b"\n")),
    ("unknown actions", lambda b: b + b'{"strange":{"a":1}}\n{"remove":null}\n'),
    ("no commit info", lambda b: b.split(b"\n", 1)[1]),
    ("a size of nothing", lambda b: re.sub(rb'"size": \d+', b'"size": 0', b)),
    ("a size of much", lambda b: re.sub(rb'"size": \d+', b'"size": 99999999999', b)),
    ("the far future", lambda b: b.replace(b"1700000000000", b"99999999999999")),
    ("unknown members", lambda b: b.replace(b'"dataC', b'"tags":{"a":null},"y":[{}],"dataC')),
]


@pytest.mark.parametrize("change", [c for _, c in LINES], ids=[n for n, _ in LINES])
def test_commits_as_others_may_write_them(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    log = begun(tmp_path / "t")
    log.commit(log.add("a.parquet", ints(1), stats={}))
    file = log.root / "_delta_log" / f"{1:020}.json"
    file.write_bytes(change(file.read_bytes()))
    assert rows_of(log.root) == [1]
    assert [c.version for c in lepton.table(log.root).history()] == [1, 0]


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b + b'{"add":{"pa',
        lambda b: b"\xef\xbb\xbf" + b,
        lambda b: b.replace(b'"partitionValues": {}', b'"partitionValues": null'),
        lambda b: b.replace(b'"size"', b'"sizf"'),
    ],
    ids=["cut", "byte order mark", "no partition", "no size"],
)
def test_commits_that_are_none_are_refused(
    tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    log = begun(tmp_path / "t")
    log.commit(log.add("a.parquet", ints(1), stats={}))
    file = log.root / "_delta_log" / f"{1:020}.json"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(LakeError, match=r"cannot open the Delta table at .*t'"):
        rows_of(log.root)


@pytest.mark.parametrize(
    "hint", ["", "no JSON", "{}", "[]", "null", "\0\0", '{"version":-1,"size":3}']
)
def test_a_hint_that_makes_no_sense_is_passed_over(tmp_path: Path, hint: str) -> None:
    lepton.write(ints(1), tmp_path / "t")
    (tmp_path / "t/_delta_log/_last_checkpoint").write_text(hint)
    assert rows_of(tmp_path / "t") == [1]


@pytest.mark.parametrize("version", [0, 99])
def test_a_hint_to_no_checkpoint_says_what_to_do(tmp_path: Path, version: int) -> None:
    lepton.write(ints(1), tmp_path / "t")
    hint = tmp_path / "t/_delta_log/_last_checkpoint"
    hint.write_text(json.dumps({"version": version, "size": 3}))
    with pytest.raises(LakeError, match="names a checkpoint that is not there: remove that file"):
        rows_of(tmp_path / "t")
    hint.unlink()
    assert rows_of(tmp_path / "t") == [1]


def test_a_version_from_before_the_logs_beginning_is_named(tmp_path: Path) -> None:
    root = tmp_path / "t"
    for n in range(4):
        lepton.write(ints(n), root)
        if n == 2:
            DeltaTable(root).create_checkpoint()
    for n in range(3):
        (root / "_delta_log" / f"{n:020}.json").unlink()
    load_version.cache_clear()

    assert sorted(lepton.table(root, version=2).to_arrow()["x"].to_pylist()) == [0, 1, 2]
    assert sorted(rows_of(root)) == [0, 1, 2, 3]
    with pytest.raises(LakeError, match="no version 1 any more: its log begins at version 2"):
        lepton.table(root, version=1).load()


def claims(low: str, high: str, nulls: str = "0") -> str:
    return (
        f'{{"numRecords":3,"minValues":{{"x":{low}}},"maxValues":{{"x":{high}}},'
        f'"nullCount":{{"x":{nulls}}}}}'
    )


@pytest.mark.parametrize(
    "statistics",
    [
        "",
        "null",
        "[]",
        '{"numRecords":3,"minVal',
        '{"numRecords":"3"}',
        '{"numRecords":3.0}',
        '{"numRecords":3,"minValues":{"x":1}}',
        '{"numRecords":3,"minValues":{"y":7},"maxValues":{"y":9},"nullCount":{"y":0}}',
        claims('"abc"', '"abd"'),
        claims("1.0", "3.0"),
        claims("null", "null", "null"),
        claims("-1e400", "1e400"),
        claims('{"y":9}', '{"y":9}', '{"y":9}'),
    ],
)
def test_statistics_that_make_no_sense_lose_no_row(tmp_path: Path, statistics: str) -> None:
    log = begun(tmp_path / "t")
    file = log.add("a.parquet", ints(1, 2, 3))
    file["add"]["stats"] = statistics
    log.commit(file)
    assert rows_of(log.root) == [1, 2, 3]
    assert rows_of(log.root, "x > 1 AND x < 3") == [2]
    assert rows_of(log.root, "NOT x = 2") == [1, 3]


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "low", "high", "where", "kept"),
    [
        ([-0.0], "-0.0", "-0.0", "x = 0.0", [-0.0]),
        ([-0.0, 0.0], "0.0", "-0.0", "x >= 0.0", [-0.0, 0.0]),
        ([1.0, NAN], "1.0", '"NaN"', "x = 1.0", [1.0]),
        ([1.0, NAN], "1.0", "1.0", "NOT (x = 1.0)", [NAN]),
        ([1.0, INFINITE], "1.0", '"Infinity"', "x > 5", [INFINITE]),
    ],
)
def test_bounds_of_floats_lose_no_row(
    tmp_path: Path, values: list[float], low: str, high: str, where: str, kept: list[float]
) -> None:
    log = begun(tmp_path / "t", [column("x", "double")])
    file = log.add("a.parquet", pa.table({"x": pa.array(values, pa.float64())}))
    file["add"]["stats"] = claims(low, high).replace(":3,", f":{len(values)},", 1)
    log.commit(file)
    assert list(map(repr, rows_of(log.root, where))) == list(map(repr, kept))


PATHS: list[tuple[str, Callable[[Path], str]]] = [
    ("a.parquet", lambda root: f"file://{root}/a.parquet"),
    ("a.parquet", lambda root: f"file:{root}/a.parquet"),
    ("a.parquet", lambda _: "./a.parquet"),
    ("a b.parquet", lambda _: "a b.parquet"),
    ("a b.parquet", lambda _: "a%20b.parquet"),
    ("a+b.parquet", lambda _: "a+b.parquet"),
    ("a%20b.parquet", lambda _: "a%2520b.parquet"),
    ("ü.parquet", lambda _: "%c3%bc.parquet"),
    ("a#b.parquet", lambda _: "a#b.parquet"),
    ("a?b.parquet", lambda _: "a%3Fb.parquet"),
    ("p=a:b/x.parquet", lambda _: "p=a%3Ab/x.parquet"),
    ("a\nb.parquet", lambda _: "a%0Ab.parquet"),
]


@pytest.mark.parametrize(("name", "spelled"), PATHS, ids=[p[0] for p in PATHS])
def test_a_path_is_found_however_it_is_spelled(
    tmp_path: Path, name: str, spelled: Callable[[Path], str]
) -> None:
    log = begun(tmp_path / "t")
    log.commit(log.add(name, ints(1), stats={}, path=spelled(log.root)))
    assert rows_of(log.root) == [1]


NAMES = ["a b", "a.b", "a`b", 'a"b', "ü", "u\u0308", "select", "1", "a,b", "{a}", "a=b", "%41"]
NAMES += ["path", "add", "_metadata", "y" * 300, "a\tb", "\\", "Ⓐ?", "a;--"]


@pytest.mark.parametrize("name", NAMES)
def test_a_column_is_found_whatever_its_name(tmp_path: Path, name: str) -> None:
    log = begun(tmp_path / "t", [column(name, "long")])
    known = {"minValues": {name: 1}, "maxValues": {name: 1}, "nullCount": {name: 0}}
    log.commit(log.add("a.parquet", ints(1, name=name), stats=known))
    quoted = '"' + name.replace('"', '""') + '"'
    assert rows_of(log.root) == rows_of(log.root, f"{quoted} = 1") == [{name: 1}]
    assert rows_of(log.root, f"{quoted} <> 1") == []
    lepton.write(ints(2, name=name), log.root)
    assert sorted(r[name] for r in rows_of(log.root)) == [1, 2]


@pytest.mark.parametrize("asks", [protocol(reader=1, writer=2), protocol([])])
def test_names_are_mapped_where_only_the_properties_say_so(tmp_path: Path, asks: Action) -> None:
    log = Log(tmp_path / "t")
    columns = [column("x", "long", "c1", 1)]
    log.commit(asks, metadata(columns, columnMapping_mode="name"))
    log.commit(log.add("a.parquet", ints(1, name="c1"), stats={}))
    assert rows_of(log.root) == [1]


def test_a_column_that_went_and_came_back_is_another(tmp_path: Path) -> None:
    log = Log(tmp_path / "t")
    how = {"columnMapping_mode": "name", "columnMapping_maxColumnId": "2"}
    asks = protocol(reader=2, writer=5)
    log.commit(asks, metadata([column("x", "long", "c1", 1)], **how))
    log.commit(log.add("a.parquet", ints(1, name="c1"), stats={}))
    log.commit(metadata([column("x", "string", "c2", 2)], **how))
    log.commit(log.add("b.parquet", pa.table({"c2": ["new"]}), stats={}))
    assert rows_of(log.root) == [None, "new"]
    assert rows_of(log.root, "x IS NULL") == [None]


def nothing_asked(log: Log) -> Iterator[Action]:
    yield metadata([column("x", "long")])


def nothing_described(log: Log) -> Iterator[Action]:
    yield protocol(reader=1, writer=2)


def a_type_without_values(log: Log) -> Iterator[Action]:
    yield protocol(reader=1, writer=2)
    yield metadata([column("x", "long"), column("v", "void")])


@pytest.mark.parametrize("first", [nothing_asked, nothing_described, a_type_without_values])
def test_a_table_that_is_none_is_refused(
    tmp_path: Path, first: Callable[[Log], Iterator[Action]]
) -> None:
    log = Log(tmp_path / "t")
    log.commit(*first(log))
    log.commit(log.add("a.parquet", ints(1), stats={}))
    with pytest.raises(LakeError, match=re.escape(str(log.root))):
        rows_of(log.root)
