"""Tables on S3, by a real S3 server: the same order as on a local path, with both engines."""

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import ray.data
from deltalake import DeltaTable

import lepton
from benchmarks.lake_writers import Crowd, kill_at_random
from lepton.cli import main
from lepton.errors import ConflictError, LakeError
from lepton.lake import Snapshot
from lepton.lake.files import write_files
from lepton.lake.maintenance import vacuum
from lepton.registry import Registry
from lepton.stream import Cursor, Digest

VECTORS = Path(__file__).parents[1] / "data/delta-tables/dv-partitioned-with-checkpoint/table"

pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.usefixtures("endpoint"),
]


@pytest.fixture(scope="module")
def tables(
    endpoint: str, options: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Snapshot, Snapshot]:
    """One table twice, file by file: on a local path and on S3."""
    root = tmp_path_factory.mktemp("lake") / "t"
    for first in (0, 500, 1000):
        ids = np.arange(first, first + 500)
        rows = pa.table({"id": ids, "x": list(ids[:, None] * np.ones(3)), "even": ids % 2 == 0})
        lepton.write(rows, root, partition_by=["even"])
    DeltaTable(root).delete("id >= 700 AND id < 730")
    for file in root.rglob("*"):
        if file.is_file():
            target = f"{endpoint}/lake/t/{file.relative_to(root)}"
            httpx.put(target.replace("%", "%25"), content=file.read_bytes()).raise_for_status()
    return lepton.table(root), lepton.table("s3://lake/t", storage_options=options)


def digest(shards: list[Any]) -> Digest:
    total = Digest()
    for shard in shards:
        while True:
            try:
                total += shard.next_part().digest
            except StopIteration:
                break
    return total


def test_the_order_is_that_of_a_local_path_at_any_size_with_both_engines(
    tables: tuple[Snapshot, Snapshot],
) -> None:
    here, there = tables
    expected = here.stream(batch_size=64, lanes=4, seed=1).expected(0)
    stream = there.stream(batch_size=64, lanes=4, seed=1)
    cluster = there.stream(batch_size=64, lanes=4, seed=1, engine="ray_data")

    assert stream.expected(0) == expected
    for n in (1, 3):
        assert digest([stream.shard(rank, n) for rank in range(n)]) == expected
    assert digest([cluster.shard(0, 1)]) == expected


def test_rows_filters_and_resuming_work_over_s3(tables: tuple[Snapshot, Snapshot]) -> None:
    here, there = tables
    mine, its = here.where("id > 600 AND even"), there.where("id > 600 AND even")
    rest = there.stream(batch_size=64, lanes=2).shard(0, 1, Cursor(0, 640), format="arrow")

    assert its.to_arrow().equals(mine.to_arrow())
    assert its.count_rows() == mine.count_rows()
    assert sum(len(rows) for rows in rest) == here.count_rows() - 640
    assert [c.version for c in there.history()] == [3, 2, 1, 0]


def test_writing_to_s3_and_what_goes_wrong_there(options: dict[str, str]) -> None:
    rows = pa.table({"k": [1, 2, 3]})
    first = lepton.write(rows, "s3://lake/written", storage_options=options, txn=("job", 1))
    again = lepton.write(rows, "s3://lake/written", storage_options=options, txn=("job", 1))

    assert first.version == again.version == 0
    assert again.to_arrow().equals(rows)
    assert "open-sesame" not in repr(again)
    with pytest.raises(LakeError, match="no Delta table at 's3://lake/nothing'") as missing:
        lepton.table("s3://lake/nothing", storage_options=options)
    with pytest.raises(LakeError, match="s3://no-such-bucket/t") as bucket:
        lepton.table("s3://no-such-bucket/t", storage_options=options)
    for error in (missing, bucket):
        assert "open-sesame" not in str(error.value)


def test_vacuum_on_s3_removes_orphans_and_what_nobody_needs(
    options: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uri, rows = "s3://lake/cleaned", pa.table({"x": [1, 2], "p": ["a/b c%", "é"]})
    keep_nothing = {"delta.deletedFileRetentionDuration": "interval 0 hours"}
    schema = pa.schema({"x": pa.int64(), "p": pa.string()})
    DeltaTable.create(
        uri, schema, partition_by=["p"], configuration=keep_nothing, storage_options=options
    )
    for mode in ("append", "overwrite", "overwrite"):
        lepton.write(rows, uri, mode=mode, storage_options=options)
    orphans = {f.path for f in write_files(rows, uri, ["p"], options)}
    dead = {f.path for f in lepton.table(uri, version=2, storage_options=options).files()}
    end = time.monotonic() + 60
    while set(vacuum(uri, protect=[1], storage_options=options).removed) != orphans | dead:
        assert time.monotonic() < end  # S3 tells whole seconds: files of this one are too young
        time.sleep(0.2)
    run = tmp_path / "runs" / "unfinished"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"table": f"{uri}@1"}))
    for name, value in {**options, "RAY_ENABLE_AUTO_CONNECT": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["vacuum", uri, "--home", str(tmp_path)]) == 0
    planned = capsys.readouterr().out
    assert main(["vacuum", uri, "--home", str(tmp_path), "--delete"]) == 0

    assert "version 1 stays for run unfinished" in planned
    assert all(path in planned for path in orphans | dead)
    assert vacuum(uri, protect=[1], storage_options=options).removed == ()
    for version in (1, 3):
        table = lepton.table(uri, version=version, storage_options=options)
        assert table.to_arrow().sort_by("x").equals(rows)
    with pytest.raises(LakeError, match="vacuumed"):
        lepton.table(uri, version=2, storage_options=options).to_arrow()


def test_deletion_vectors_are_read_from_s3(endpoint: str, options: dict[str, str]) -> None:
    for file in VECTORS.rglob("*"):
        if file.is_file():
            target = f"{endpoint}/lake/vectors/{file.relative_to(VECTORS)}"
            httpx.put(target.replace("%", "%25"), content=file.read_bytes()).raise_for_status()
    here, there = lepton.table(VECTORS), lepton.table("s3://lake/vectors", storage_options=options)

    assert there.to_arrow().equals(here.to_arrow())
    assert there.count_rows() == here.count_rows() < sum(f.rows or 0 for f in here.files())
    assert there.to_dataset().count() == here.count_rows()


def test_a_server_that_first_refuses_everything_is_asked_again(options: dict[str, str]) -> None:
    rows = pa.table({"k": [1, 2, 3]})
    lepton.write(rows, "s3://lake/busy", storage_options=options)
    table = lepton.write(rows, "s3://lake/busy", mode="merge", key="k", storage_options=options)

    assert table.to_arrow().sort_by("k").equals(rows)
    assert table.history()[0].operation == "MERGE"


@pytest.mark.parametrize("txn", [None, ("job", 2)], ids=["plain", "transaction"])
def test_a_commit_whose_answer_is_lost_counts_once(
    options: dict[str, str], txn: tuple[str, int] | None
) -> None:
    uri, first, more = f"s3://lake/lost{txn is None}", pa.table({"k": [1]}), pa.table({"k": [2]})
    lepton.write(first, uri, storage_options=options)
    lepton.write(more, uri, txn=txn, storage_options=options)
    merged = pa.table({"k": [2, 3]})
    lepton.write(
        merged, uri, mode="merge", key="k", txn=txn and ("job", 3), storage_options=options
    )
    four = pa.table({"k": [4]})
    table = lepton.write(
        four,
        uri,
        mode="replace_where",
        where="k > 2",
        txn=txn and ("job", 4),
        storage_options=options,
    )

    assert sorted(table.to_arrow()["k"].to_pylist()) == [1, 2, 4]
    told = table.changes(0)["k"].to_pylist()
    assert told.count(4) == 1


def test_a_dataset_is_written_to_s3(options: dict[str, str]) -> None:
    table = lepton.write(ray.data.range(100), "s3://lake/spread", storage_options=options)

    assert sorted(table.to_arrow()["id"].to_pylist()) == list(range(100))


def test_killed_writers_on_s3_lose_no_commit_and_repeat_none(options: dict[str, str]) -> None:
    writers = ("append-1", "append-2")
    with Crowd("s3://lake/kills", writers, options) as crowd:
        steps = kill_at_random(crowd, 3, random.Random(5), 0.5)
        crowd.finish({n: steps[n] + 2 for n in writers})
        crowd.steps()


@pytest.mark.parametrize("where", ["registry", "busy-registry", "lost-registry"])
def test_a_registry_on_s3_has_one_winner_per_step(options: dict[str, str], where: str) -> None:
    uri = f"s3://lake/{where}"
    first = Registry(uri, options)
    for _ in range(4):
        first.register("m", checkpoint="c", manifest_sha256="s")
    seq = first.state("m").pointer.seq

    def rival(version: int) -> int | None:
        mine = Registry(uri, options)
        assert mine.version("m", version).version == version
        try:
            return mine.promote("m", version, expect=seq).pointer.champion
        except ConflictError:
            return None

    with ThreadPoolExecutor(4) as pool:
        won = [w for w in pool.map(rival, (1, 2, 3, 4)) if w is not None]
    first.describe("m", 1, note="kept", protected=True)
    read = Registry(uri, options)

    assert [read.version("m", "champion").version] == won
    assert [e.seq for e in read.history("m")] == [1, 2, 3, 4, 5, 6]
    assert read.version("m", 1).note == "kept"
