"""Merge, delete and replace_where against a dictionary, whatever the files look like."""

import datetime as dt
import shutil
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from hypothesis import given, settings
from hypothesis import strategies as st

import lepton
from benchmarks.conformance_log import Log, column, metadata, protocol
from lepton.errors import LakeError
from lepton.lake.commit import removable
from lepton.lake.read import unchecked_files

VECTORS = Path(__file__).parents[1] / "data/delta-tables/dv-partitioned-with-checkpoint/table"
SCHEMA = pa.schema(
    {"k": pa.int64(), "s": pa.string(), "p": pa.string(), "v": pa.list_(pa.float64())}
)
Model = dict[tuple[int, str], dict[str, Any]]

ROW = st.fixed_dictionaries(
    {
        "k": st.integers(0, 6),
        "s": st.sampled_from(["a", "b", "é" * 40]),
        "p": st.sampled_from([None, "x", "y z"]),
        "v": st.none() | st.lists(st.none() | st.floats(width=32), max_size=2),
    }
)
ROWS = st.lists(ROW, max_size=6, unique_by=lambda r: (r["k"], r["s"]))
STEP = st.tuples(st.sampled_from(["merge", "delete", "replace_where"]), ROWS)


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, SCHEMA)


def shown(rows: list[dict[str, Any]]) -> list[str]:
    return sorted(repr(sorted(r.items())) for r in rows)


@settings(max_examples=12, deadline=None)
@given(first=ROWS, steps=st.lists(STEP, min_size=1, max_size=4), by=st.booleans())
def test_every_change_does_what_a_dictionary_would(
    first: list[dict[str, Any]], steps: list[Any], by: bool
) -> None:
    model: Model = {(r["k"], r["s"]): r for r in first}
    with TemporaryDirectory() as folder:
        uri = Path(folder, "t")
        parts = ["p"] if by else None
        empty = SCHEMA.empty_table()
        lepton.write(empty, uri, partition_by=parts)
        for row in first:
            lepton.write(table_of([row]), uri)
        for mode, rows in steps:
            if mode == "merge":
                lepton.write(table_of(rows), uri, mode="merge", key=["k", "s"])
                model |= {(r["k"], r["s"]): r for r in rows}
            elif mode == "delete":
                keys = table_of(rows).select(["s", "k"])
                lepton.write(keys, uri, mode="delete", key=["k", "s"])
                model = {
                    k: r for k, r in model.items() if k not in {(r["k"], r["s"]) for r in rows}
                }
            else:
                put = [r for r in rows if r["k"] > 3 and (r["k"], r["s"]) not in model]
                where = "k > 3"
                lepton.write(table_of(put), uri, mode="replace_where", where=where)
                model = {k: r for k, r in model.items() if k[0] <= 3}
                model |= {(r["k"], r["s"]): r for r in put}
            table = lepton.table(uri)

            assert shown(table.to_arrow().to_pylist()) == shown(list(model.values()))
            assert unchecked_files(table.load()) == ()
            assert all(f.rows is not None for f in table.files())


@pytest.fixture
def uri(tmp_path: Path) -> str:
    uri = str(tmp_path / "t")
    for start in (0, 10):
        lepton.write(pa.table({"k": range(start, start + 10), "x": ["old"] * 10}), uri)
    return uri


def test_only_files_with_a_changed_row_are_written_anew(uri: str) -> None:
    before = {f.path for f in lepton.table(uri).files()}
    table = lepton.write(pa.table({"k": [12, 99], "x": ["new"] * 2}), uri, mode="merge", key="k")
    after = {f.path for f in table.files()}

    assert len(before & after) == 1
    assert table.version == 2
    assert table.history()[0].operation == "MERGE"
    assert sorted(table.where("x = 'new'").to_arrow()["k"].to_pylist()) == [12, 99]
    assert len(list(Path(uri).glob("*.parquet"))) == 4
    rows = table.to_arrow()["k"].to_pylist()
    assert sorted(rows) == [*range(20), 99]
    assert table.changes(1).num_rows == 10 + 11


def test_nothing_to_do_commits_nothing_but_a_transaction(uri: str) -> None:
    none = pa.table({"k": pa.array([], pa.int64()), "x": pa.array([], pa.string())})
    assert lepton.write(none, uri, mode="merge", key="k").version == 1
    assert lepton.write(pa.table({"k": [77]}), uri, mode="delete", key="k").version == 1
    for _ in range(2):
        assert lepton.write(none, uri, mode="merge", key="k", txn=("job", 1)).version == 2


def test_a_change_that_others_commits_come_before_is_worked_out_again(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lepton.lake import rewrite

    real, rivals = rewrite.commit_changes, iter([5, 15, 30])

    def late(*given: Any, **named: Any) -> None:
        rival = next(rivals, None)
        if rival is not None:
            write_deltalake(uri, pa.table({"k": [rival], "x": ["rival"]}), mode="append")
        real(*given, **named)

    monkeypatch.setattr(rewrite, "commit_changes", late)
    changed = pa.table({"k": [5, 30], "x": ["mine"] * 2})
    table = lepton.write(changed, uri, mode="merge", key="k")

    found = table.to_arrow().filter(pa.compute.field("k").isin([5, 15, 30])).to_pylist()
    assert sorted((r["k"], r["x"]) for r in found) == [
        (5, "mine"),
        (5, "mine"),
        (15, "old"),
        (15, "rival"),
        (30, "mine"),
    ]
    live = {f.path for f in table.files()} | {
        f.path for v in range(table.version) for f in lepton.table(uri, version=v).files()
    }
    assert {p.name for p in Path(uri).glob("*.parquet")} == live


def test_a_replacement_loses_to_any_other_commit(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lepton.lake import rewrite

    real = rewrite.commit_changes

    def late(*given: Any, **named: Any) -> None:
        write_deltalake(uri, pa.table({"k": [50], "x": ["rival"]}), mode="append")
        real(*given, **named)

    monkeypatch.setattr(rewrite, "commit_changes", late)
    with pytest.raises(lepton.errors.WriteConflict, match="commit 2"):
        lepton.write(pa.table({"k": [3], "x": ["n"]}), uri, mode="replace_where", where="k < 5")
    assert lepton.table(uri).count_rows() == 21
    assert len(list(Path(uri).glob("*.parquet"))) == 3


@pytest.mark.parametrize("column", ["k", "p"])
def test_zeros_and_floats_are_one_key(tmp_path: Path, column: str) -> None:
    uri = tmp_path / "t"
    lepton.write(pa.table({"k": [0.0, 1.5], "p": [0.0, 1.5], "x": [1, 2]}), uri)
    new = pa.table({"k": [-0.0], "p": [-0.0], "x": [3]})
    table = lepton.write(new, uri, mode="merge", key=column)

    assert sorted(table.to_arrow()["x"].to_pylist()) == [2, 3]
    with pytest.raises(LakeError, match="more than once"):
        lepton.write(pa.concat_tables([new, new]), uri, mode="delete", key=column)


def test_a_change_data_feed_is_told_by_the_commit_itself(tmp_path: Path) -> None:
    feed = tmp_path / "feed"
    write_deltalake(
        feed, pa.table({"k": [1, 2, 3]}), configuration={"delta.enableChangeDataFeed": "true"}
    )
    write_deltalake(feed, pa.table({"k": [4]}), mode="append")
    lepton.write(pa.table({"k": [2, 9]}), feed, mode="merge", key="k")
    table = lepton.write(pa.table({"k": [4]}), feed, mode="delete", key="k")

    assert sorted(table.to_arrow()["k"].to_pylist()) == [1, 2, 3, 9]
    assert unchecked_files(table.load()) == ()
    told = table.changes(1).to_pylist()
    assert ("delete", 4) in {(r["_change_type"], r["k"]) for r in told}
    assert not [r for r in told if r["k"] in (1, 3)]  # they only moved
    theirs = DeltaTable(feed).load_cdf(starting_version=2, ending_version=table.version)
    seen = pa.RecordBatchReader.from_stream(theirs).read_all().to_pylist()
    assert sorted((r["_commit_version"], r["_change_type"], r["k"]) for r in seen) == sorted(
        (r["_commit_version"], r["_change_type"], r["k"]) for r in told
    )
    assert [c.operation for c in table.history()[:2]] == ["DELETE", "MERGE"]
    assert table.version == 3


def test_deletion_vectors_stay_applied_through_a_merge_and_a_delete(tmp_path: Path) -> None:
    uri = shutil.copytree(VECTORS, tmp_path / "t")
    table = lepton.table(uri)
    before = table.to_arrow().to_pylist()
    vector = next(f for f in table.files() if f.vector is not None)
    assert not removable(vector)
    gone = table.read_file(vector).to_pylist()[0]
    keys = pa.table(
        {"part": [gone["part"]], "col1": [gone["col1"]]},
        schema=pa.schema({"part": pa.int32(), "col1": pa.int32()}),
    )
    after = lepton.write(keys, uri, mode="delete", key=["part", "col1"]).to_arrow().to_pylist()

    left = [r for r in before if (r["part"], r["col1"]) != (gone["part"], gone["col1"])]
    assert shown(after) == shown(left)
    new = pa.table(
        {"part": [gone["part"], 99], "col1": [gone["col1"], 99], "col2": ["back", "new"]},
        schema=table.schema,
    )
    merged = lepton.write(new, uri, mode="merge", key=["part", "col1"])
    assert shown(merged.to_arrow().to_pylist()) == shown(left + new.to_pylist())
    fresh = [f.path for f in merged.files() if f.path not in {f.path for f in table.files()}]
    assert fresh
    assert not set(fresh) & set(unchecked_files(merged.load()))


@pytest.mark.parametrize(
    ("rows", "how", "told"),
    [
        (pa.table({"x": ["a"]}), {"mode": "delete", "key": "k"}, "lack key column k"),
        (pa.table({"k": [1]}), {"mode": "delete", "key": "kk"}, r"no key column kk \(did you mean"),
        (pa.table({"k": [1], "z": [1]}), {"mode": "delete", "key": "k"}, "no column z"),
        (pa.table({"k": [1, 1]}), {"mode": "delete", "key": "k"}, "more than once"),
        (pa.table({"k": [None]}), {"mode": "delete", "key": "k"}, "has a NULL"),
        (pa.table({"k": ["a"]}), {"mode": "delete", "key": "k"}, "int64"),
    ],
)
def test_keys_that_do_not_fit_change_nothing(
    uri: str, rows: pa.Table, how: dict[str, Any], told: str
) -> None:
    files = sorted(Path(uri).rglob("*"))
    with pytest.raises(LakeError, match=told) as refused:
        lepton.write(rows, uri, **how)
    assert f"{uri}'@1" in str(refused.value)
    assert sorted(Path(uri).rglob("*")) == files


CHANGES: list[dict[str, Any]] = [
    {"mode": "overwrite"},
    {"mode": "merge", "key": "x"},
    {"mode": "delete", "key": "x"},
    {"mode": "replace_where", "where": "x = 2"},
]


@pytest.mark.parametrize("how", CHANGES, ids=[h["mode"] for h in CHANGES])
@pytest.mark.parametrize("spelled", ["p=a%20b", "p=a:b", "p=a%3Ab", "p=ü", "p=%C3%BC", "p=%61"])
def test_files_go_however_the_log_spells_them(
    tmp_path: Path, how: dict[str, Any], spelled: str
) -> None:
    log = Log(tmp_path / "t")
    rows = pa.table({"x": pa.array([1, 2], pa.int64())})
    add = log.add(f"{unquote(spelled)}/1.parquet", rows, {"p": "v"}, path=f"{spelled}/1.parquet")
    columns = metadata([column("x", "long"), column("p", "string")], ["p"])
    log.commit(protocol(reader=1, writer=2), columns, add)
    new = pa.table({"x": [2], "p": ["w"]})
    table = lepton.write(new, log.root, **how)
    assert table.where("x = 2").count_rows() == (how["mode"] != "delete")
    assert table.count_rows() == {"overwrite": 1, "delete": 1}.get(how["mode"], 2)
    assert DeltaTable(log.root).to_pyarrow_table().num_rows == table.count_rows()


def test_a_nested_key_is_refused(tmp_path: Path) -> None:
    rows = pa.table({"k": [{"a": 1}], "x": [1]})
    lepton.write(rows, tmp_path / "t")
    with pytest.raises(LakeError, match=r"key column k is struct.*plain values"):
        lepton.write(rows, tmp_path / "t", mode="merge", key="k")


KEYS = {
    "binary": [b"a", b"\xff\x00", b""],
    "text": ["a", "b", "é" * 50],
    "date": [dt.date(1, 1, 1), dt.date(9999, 1, 1)],
    "time": [dt.datetime(2020, 1, 1, 0, 0, 0, n, dt.UTC) for n in (1, 999, 1001)],
    "decimal": [Decimal("1.10"), Decimal("-99999999999999999.99")],
    "float": [0.1, float("inf"), -0.0],
    "bool": [True, False],
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_of_every_type_find_their_rows(tmp_path: Path, name: str) -> None:
    keys = pa.array(KEYS[name])
    for n in range(len(keys)):
        lepton.write(pa.table({"k": keys.slice(n, 1), "v": [0]}), tmp_path / "t")
    new = pa.table({"k": keys, "v": [1] * len(keys)})
    table = lepton.write(new, tmp_path / "t", mode="merge", key="k")
    assert table.to_arrow()["v"].to_pylist() == [1] * len(keys)
    rest = lepton.write(new.select(["k"]).slice(1), tmp_path / "t", mode="delete", key="k")
    assert rest.to_arrow()["k"].to_pylist() == keys.slice(0, 1).to_pylist()


def test_a_delete_from_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LakeError, match="no Delta table"):
        lepton.write(pa.table({"k": [1]}), tmp_path / "t", mode="delete", key="k")
