"""Commits in lepton's own hand are whole, the next ones, and anybody's to read."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError

import lepton
from lepton.errors import LakeError
from lepton.lake.journal import publish
from lepton.lake.read import unchecked_files

FEED = {"delta.enableChangeDataFeed": "true", "delta.checkpointInterval": "10"}
SCHEMA = pa.schema({"k": pa.int64(), "v": pa.int64()})


def rows(keys: list[int], value: int) -> pa.Table:
    return pa.table({"k": keys, "v": [value] * len(keys)}, schema=SCHEMA)


def test_of_many_who_make_one_commit_one_does(tmp_path: Path) -> None:
    (tmp_path / "_delta_log").mkdir()
    won: list[int] = []
    start = threading.Barrier(8)

    def commit(n: int) -> None:
        start.wait()
        try:
            publish(str(tmp_path), 0, [{"commitInfo": {"n": n}}], None)
        except CommitFailedError:
            return
        won.append(n)

    threads = [threading.Thread(target=commit, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert [p.name for p in (tmp_path / "_delta_log").iterdir()] == [f"{0:020}.json"]
    assert f'"n":{won[0]}' in (tmp_path / "_delta_log" / f"{0:020}.json").read_text()


def test_a_store_that_needs_a_lock_is_refused() -> None:
    options = {"AWS_S3_LOCKING_PROVIDER": "dynamodb", "aws_secret_access_key": "hidden"}
    with pytest.raises(LakeError, match="locking provider") as refused:
        publish("s3://bucket/t", 3, [], options)
    assert "hidden" not in str(refused.value)


def test_merges_from_many_threads_into_a_feed_are_each_there_and_told_once(tmp_path: Path) -> None:
    uri = str(tmp_path / "t")
    DeltaTable.create(uri, SCHEMA, configuration=FEED)
    lepton.write(rows(list(range(8)), 0), uri)

    def merge(n: int) -> None:
        for at in range(2):
            lepton.write(rows([n, 10 * n + at + 100], n + 1), uri, mode="merge", key="k")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(merge, range(4)))
    table = lepton.table(uri)
    assert table.version == 9
    found: dict[int, int] = {r["k"]: r["v"] for r in table.to_arrow().to_pylist()}
    assert found == {
        **dict.fromkeys(range(4, 8), 0),
        **{n: n + 1 for n in range(4)},
        **{10 * n + at + 100: n + 1 for n in range(4) for at in range(2)},
    }
    told: list[Any] = table.changes(1).to_pylist()
    assert sorted(r["k"] for r in told if r["_change_type"] == "insert") == sorted(
        k for k in found if k >= 100
    )
    assert len([r for r in told if r["_change_type"] == "update_postimage"]) == 8
    assert unchecked_files(table.load()) == ()
    lepton.write(rows([0], 9), uri, mode="merge", key="k")  # commit 10 brings a checkpoint
    assert list(Path(uri).glob("_delta_log/*.checkpoint.parquet"))
    assert DeltaTable(uri).to_pyarrow_table().num_rows == len(found)
    orphans = {p.name for p in Path(uri).rglob("part-*.parquet")}
    named = "".join(p.read_text() for p in Path(uri).glob("_delta_log/*.json"))
    assert not [o for o in orphans if o not in named], "losers leave nothing"
