"""Changes come from the change data feed where there is one, else from the files."""

from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

import lepton
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
