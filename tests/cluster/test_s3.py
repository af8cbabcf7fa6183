"""Tables on S3, by a real S3 server: the same order as on a local path, with both engines."""

import json
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import ray.data
from deltalake import DeltaTable, QueryBuilder

import lepton
from benchmarks.lake_writers import Crowd, kill_at_random
from lepton import cluster
from lepton.cli import main
from lepton.errors import ConflictError, LakeError
from lepton.lake import Snapshot
from lepton.lake.files import write_files
from lepton.lake.maintenance import vacuum
from lepton.lake.source import Place, Rows
from lepton.registry import Registry
from lepton.stream import Cursor, Digest
from tests.cluster.test_registry import one_wins_each_step
from tests.cluster.world import wait_until

PROXY = Path(__file__).parents[2] / "benchmarks" / "lake_proxy.py"
VECTORS = Path(__file__).parents[1] / "data/delta-tables/dv-partitioned-with-checkpoint/table"

pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.usefixtures("endpoint"),
]


def answers(url: str) -> bool:
    """Whether somebody listens by now."""
    with suppress(httpx.TransportError):
        return httpx.get(url, timeout=60).is_success
    return False


@pytest.fixture
def troubled(endpoint: str, options: dict[str, str], tmp_path: Path) -> Iterator[dict[str, str]]:
    """The same server by a way on which one of eight requests runs into trouble."""
    (port,) = cluster.free_ports(1)
    url = f"http://127.0.0.1:{port}"
    with (tmp_path / "log").open("w") as log:
        proxy = subprocess.Popen(
            [sys.executable, str(PROXY), str(port), endpoint, "8"], stdout=log, stderr=log
        )
    try:
        wait_until(lambda: proxy.poll() is not None or answers(f"{url}/troubles"))
        assert proxy.poll() is None
        yield options | {"AWS_ENDPOINT_URL": url, "timeout": "1s"}
    finally:
        proxy.kill()
        proxy.wait()


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
    end = time.monotonic() + 180
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
    keys = here.head(3).select(["part", "col1"])
    how: dict[str, Any] = {"mode": "delete", "key": ["part", "col1"]}
    left = lepton.write(keys, "s3://lake/vectors", storage_options=options, **how)
    assert left.version == there.version + 1
    assert left.count_rows() == here.count_rows() - 3
    its = DeltaTable("s3://lake/vectors", storage_options=options)
    found = QueryBuilder().register("t", its).execute("SELECT part FROM t").read_all()
    assert len(found) == left.count_rows()


def test_a_server_that_first_refuses_everything_is_asked_again(options: dict[str, str]) -> None:
    rows = pa.table({"k": [1, 2, 3]})
    lepton.write(rows, "s3://lake/busy", storage_options=options)
    table = lepton.write(rows, "s3://lake/busy", mode="merge", key="k", storage_options=options)

    assert table.to_arrow().sort_by("k").equals(rows)
    assert table.history()[0].operation == "MERGE"


@pytest.mark.parametrize(
    ("txn", "feed"), [(None, "true"), (("job", 2), "false")], ids=["feed", "transaction"]
)
def test_a_commit_whose_answer_is_lost_counts_once(
    endpoint: str, options: dict[str, str], txn: tuple[str, int] | None, feed: str, tmp_path: Path
) -> None:
    uri, first = f"s3://lake/lost{txn is None}{feed}", pa.table({"k": [1]})
    more = pa.table({"k": [2]})
    DeltaTable.create(
        str(tmp_path), first.schema, configuration={"delta.enableChangeDataFeed": feed}
    )
    commit = f"_delta_log/{0:020}.json"
    httpx.put(
        f"{endpoint}{uri.removeprefix('s3:/')}/{commit}", content=(tmp_path / commit).read_bytes()
    )
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
    told = table.changes(1)["k"].to_pylist()
    assert told.count(4) == 1
    assert (told.count(1) == 0) or feed == "false"


def test_a_dataset_is_written_to_s3(options: dict[str, str]) -> None:
    table = lepton.write(ray.data.range(100), "s3://lake/spread", storage_options=options)

    assert sorted(table.to_arrow()["id"].to_pylist()) == list(range(100))


def test_everything_is_read_and_written_once_on_a_bad_way(
    options: dict[str, str], troubled: dict[str, str]
) -> None:
    uri, expected = "s3://lake/bad-way", dict[int, int]()
    for n in range(4):
        rows = {n: n, 100 + n: n} if n != 2 else {1: -1, 200: -1}
        expected |= rows
        data = pa.table({"k": list(rows), "v": list(rows.values())})
        how: dict[str, Any] = {"mode": "merge", "key": "k"} if n == 2 else {}
        lepton.write(data, uri, storage_options=troubled, txn=("job", n), **how)
        lepton.write(data, uri, storage_options=troubled, txn=("job", n), **how)
    spread = ray.data.range(3).map(lambda r: {"k": r["id"] + 300, "v": r["id"]})
    by_tasks = lepton.write(spread, uri, mode="merge", key="k", storage_options=troubled)
    expected |= {300: 0, 301: 1, 302: 2}
    lepton.write(
        pa.table({"k": [301], "v": [7]}),
        uri,
        mode="replace_where",
        where="k >= 301",
        storage_options=troubled,
    )
    expected = {k: v for k, v in expected.items() if k < 301} | {301: 7}
    there = lepton.table(uri, storage_options=troubled)

    for table in (there, lepton.table(uri, storage_options=options)):
        found = table.to_arrow()
        assert dict(zip(found["k"].to_pylist(), found["v"].to_pylist(), strict=True)) == expected
        assert len(found) == len(expected) == table.count_rows()
    assert by_tasks.version == 4
    assert there.version == 5
    told = httpx.get(f"{troubled['AWS_ENDPOINT_URL']}/troubles", timeout=180).json()
    assert set(told) == {"refused", "closed", "lost", "cut", "stalled"}


def test_no_secret_is_in_what_can_be_printed(options: dict[str, str]) -> None:
    lepton.write(pa.table({"k": [1]}), "s3://lake/secret", storage_options=options)
    table = lepton.table("s3://lake/secret", storage_options=options)
    wrong = options | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "max_retries": "0"}
    stream = table.where("k > 0").stream(batch_size=1, lanes=1)
    told = [repr(table), str(table), repr(table.load()), repr(stream), repr(stream.layout)]
    with pytest.raises(LakeError) as error:
        lepton.table("s3://lake/secret", storage_options=wrong)
    told += [str(error.value), repr(error.value.__cause__)]
    with pytest.raises(LakeError) as error:
        lepton.write(pa.table({"k": [1]}), "s3://lake/secret", storage_options=wrong)
    told += [str(error.value), "".join(traceback.format_exception(error.value))]
    place = Place(path="s3://lake/secret", options=options)
    told += [repr(place), repr(Rows(pa.table({"k": [1]}), place))]

    assert not [text for text in told if "open-sesame" in text or "someone" in text]


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


def test_of_sixteen_promoters_on_s3_one_wins_each_step(options: dict[str, str]) -> None:
    one_wins_each_step(lambda: Registry("s3://lake/crowded-registry", options), steps=5)
