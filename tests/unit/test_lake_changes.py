"""Changes come from the change data feed where there is one, else from the files."""

from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

import lepton
from benchmarks.conformance_log import Log, column, metadata, numbered, protocol, removed
from lepton.errors import LakeError


def told(path: Path, since: int) -> list[tuple[int, str, int]]:
    rows = lepton.table(path).changes(since).to_pylist()
    return sorted((r["_commit_version"], r["_change_type"], r["x"]) for r in rows)


def test_the_feed_tells_updates_apart(tmp_path: Path) -> None:
    data = pa.table({"x": [1, 2, 3], "p": ["a b", "a b", None]})
    feed = {"delta.enableChangeDataFeed": "true"}
    write_deltalake(tmp_path / "t", data, partition_by=["p"], configuration=feed)
    DeltaTable(tmp_path / "t").update(updates={"x": "20"}, predicate="x = 2")
    DeltaTable(tmp_path / "t").delete("x = 3")

    assert told(tmp_path / "t", 0) == [
        (1, "update_postimage", 20),
        (1, "update_preimage", 2),
        (2, "delete", 3),
    ]
    changed = lepton.table(tmp_path / "t").where("p = 'a b'").select(["x"]).changes(0)
    assert sorted(changed["x"].to_pylist()) == [2, 20]


def test_without_a_feed_files_tell_and_compaction_is_no_change(tmp_path: Path) -> None:
    for n in (1, 2):
        lepton.write(pa.table({"x": [n]}), tmp_path / "t")
    DeltaTable(tmp_path / "t").optimize.compact()
    DeltaTable(tmp_path / "t").delete("x = 1")

    assert told(tmp_path / "t", 0) == [
        (1, "insert", 2),
        (3, "delete", 1),
        (3, "delete", 2),
        (3, "insert", 2),
    ]
    with pytest.raises(LakeError, match="has versions 0 to 3"):
        told(tmp_path / "t", 9)


def test_a_deletion_vector_tells_only_the_rows_that_it_took(tmp_path: Path) -> None:
    from benchmarks.conformance_mapping import deletions_inline

    deletions_inline(tmp_path / "t")  # rows 0 and 3 gone; then 4 and 8; then a whole file

    taken = [(1, "delete", 4), (1, "delete", 8), (2, "delete", 90), (2, "delete", 91)]
    assert told(tmp_path / "t", 0) == taken
    assert told(tmp_path / "t", 1) == taken[2:]


@pytest.mark.parametrize("mode", ["name", "id"])
def test_a_feed_of_mapped_and_widened_columns_is_exact(tmp_path: Path, mode: str) -> None:
    columns = [column("p", "string", "c1", 1), column("x", "long", "c2", 2)]
    narrow, wide = (numbered("c2", kind, 2) for kind in (pa.int32(), pa.int64()))
    kind = pa.field("_change_type", pa.string())
    log = Log(tmp_path / "t")
    first = log.add("1.parquet", pa.table([[1, 2]], schema=pa.schema([narrow])), {"c1": "u"})
    configuration = {"columnMapping_mode": mode, "columnMapping_maxColumnId": "2"}
    log.commit(
        protocol(["columnMapping", "typeWidening"]),
        metadata(columns, ["p"], **configuration, enableChangeDataFeed="true"),
        first,
    )
    second = log.add("2.parquet", pa.table([[1, 20]], schema=pa.schema([narrow])), {"c1": "u"})
    told_rows = [[2, 20], ["update_preimage", "update_postimage"]]
    feed = pa.table(told_rows, schema=pa.schema([narrow, kind]))
    change = log.add("_change_data/c.parquet", feed, {"c1": "u"})["add"] | {"dataChange": False}
    log.commit(removed(first), second, {"cdc": change})
    log.commit(log.add("3.parquet", pa.table([[2**40]], schema=pa.schema([wide])), {"c1": None}))

    assert lepton.table(tmp_path / "t").changes(0).to_pylist() == [
        {"p": "u", "x": 2, "_change_type": "update_preimage", "_commit_version": 1},
        {"p": "u", "x": 20, "_change_type": "update_postimage", "_commit_version": 1},
        {"p": None, "x": 2**40, "_change_type": "insert", "_commit_version": 2},
    ]
    assert told(tmp_path / "t", 1) == [(2, "insert", 2**40)]
