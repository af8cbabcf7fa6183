"""The two engines against each other on a real local Ray, and what happens when parts of it die."""

import random
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import DeltaTable, WriterProperties, write_deltalake

import lepton
from lepton.errors import StreamError
from lepton.lake import Snapshot
from lepton.stream import Digest, Stream, mix

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """Four files of row groups of different sizes, some rows deleted, 3,960 live rows."""
    uri = str(tmp_path_factory.mktemp("lake") / "t")
    for first, size in ((0, 100), (1000, 700), (2000, 1000), (3000, 130)):
        ids = np.arange(first, first + 1000)
        rows = pa.table({"id": ids, "x": ids * 0.5, "v": list(ids[:, None] * np.ones(4))})
        properties = WriterProperties(max_row_group_size=size)
        write_deltalake(uri, rows, mode="append", writer_properties=properties)
    DeltaTable(uri).delete("id >= 1500 AND id < 1540")
    return lepton.table(uri)


CUTS = {
    "small table": {},
    "whole row groups": {"SMALL_BYTES": 0, "WINDOW_BYTES": 20_000},
    "parts of row groups": {"SMALL_BYTES": 0, "WINDOW_BYTES": 4_000},
}


def keep_even(rows: pa.Table) -> pa.Table:
    return rows.filter(pc.equal(pc.bit_wise_and(rows["id"], 1), 0))


def keep_few(rows: pa.Table) -> pa.Table:
    return rows.filter(pc.less(rows["id"], 300))


def steps_of(shards: list[Any]) -> tuple[list[list[int]], Digest]:
    """The ids of every global batch, and the order hash; ranks read at once, as they would."""
    found: list[list[Any]] = [[] for _ in shards]

    def consume(rank: int) -> None:
        while True:
            try:
                found[rank].append(shards[rank].next_part())
            except StopIteration:
                return

    threads = [threading.Thread(target=consume, args=(rank,)) for rank in range(len(shards))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    steps = [
        sorted(i for part in step for i in part.batch["id"].tolist())
        for step in zip(*found, strict=True)
    ]
    return steps, sum((part.digest for ranks in found for part in ranks), Digest())


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
def test_both_engines_deliver_the_same_batches(
    table: Snapshot, cut: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in cut.items():
        monkeypatch.setattr(f"lepton.stream.stream.{name}", value)
    for transform in (None, keep_even, keep_few):
        stream = table.stream(batch_size=96, lanes=6, seed=2, transform=transform)
        cluster = table.stream(
            batch_size=96, lanes=6, seed=2, transform=transform, engine="ray_data"
        )
        expected = steps_of([stream.shard(0, 1)])
        assert steps_of(cluster.as_ray_dataset().streaming_split(3)) == expected
        assert expected[1] == stream.expected(0)
        assert len(expected[0]) == stream.steps


def test_the_cluster_engine_keeps_the_order_hash_at_any_number_of_ranks(table: Snapshot) -> None:
    stream = table.stream(batch_size=160, lanes=16, seed=6, transform=keep_even)
    cluster = replace(stream, engine="ray_data")
    expected = steps_of([stream.shard(0, 1)])
    assert expected[1] == stream.expected(0)
    for n in (1, 2, 3, 4, 5, 6, 7, 8, 16):
        assert steps_of(cluster.as_ray_dataset().streaming_split(n)) == expected, n


def test_a_mixture_is_split_by_its_coordinators(table: Snapshot) -> None:
    def mixture(engine: Any) -> Any:
        first = table.where("id < 1000").stream(batch_size=60, lanes=4, engine=engine)
        return mix(first, table.stream(batch_size=36, lanes=4, engine=engine))

    expected, _ = steps_of([mixture("worker").shard(0, 1)])
    found, _ = steps_of(mixture("ray_data")().streaming_split(2))
    dataset = mixture("auto").as_ray_dataset()
    plain = [i for b in dataset.iter_batches(batch_format="pyarrow") for i in b["id"].to_pylist()]
    alone = [i for b in mixture("worker").shard(0, 1, format="arrow") for i in b["id"].to_pylist()]

    assert found == expected
    assert plain == alone
    assert len(plain) == sum(len(step) for step in expected) > 1000


def test_resuming_at_another_size_through_the_cluster_engine(table: Snapshot) -> None:
    stream = table.stream(batch_size=100, lanes=4, epochs=2, engine="ray_data")
    whole, _ = steps_of([stream.read_by("worker", None).shard(0, 1)])
    for cut in random.Random(7).sample(range(1, stream.steps), 2):
        before = stream.as_ray_dataset().streaming_split(2)
        first, _ = steps_of([_Few(shard, cut) for shard in before])
        after = stream.as_ray_dataset().streaming_split(3)
        for shard in after:
            shard.load_state_dict(before[1].state_dict())
        rest, _ = steps_of(list(after))

        assert first + rest == whole


class _Few:
    """The first parts of a shard."""

    def __init__(self, shard: Any, count: int) -> None:
        self._shard, self._left = shard, count

    def next_part(self) -> Any:
        if self._left == 0:
            raise StopIteration
        self._left -= 1
        return self._shard.next_part()


@pytest.mark.timeout(180)
def test_a_dead_coordinator_ends_the_ranks_with_an_error(table: Snapshot) -> None:
    import ray

    stream: Stream = table.stream(batch_size=40, lanes=4, epochs=1000, engine="ray_data")
    shards = stream.as_ray_dataset().streaming_split(2)
    next(shards[0])
    next(shards[1])
    ray.kill(shards[0]._feed._actor)
    began = time.monotonic()

    for shard in shards:
        with pytest.raises(StreamError, match=r"coordinator died.*cursor: \{.*'rows': \d+"):
            for _ in shard:
                pass
        with pytest.raises(StreamError, match="coordinator died"):  # nor does it end cleanly then
            next(shard)
    assert time.monotonic() - began < 60  # a second or two; hanging is what must not happen


def test_a_transform_that_raises_in_a_task_is_named(table: Snapshot, tmp_path: Path) -> None:
    def broken(rows: pa.Table) -> pa.Table:
        if len(rows):
            raise ZeroDivisionError("the person's transform")
        return rows

    stream = table.stream(batch_size=40, lanes=2, transform=broken, engine="ray_data")
    with pytest.raises(StreamError, match="the person's transform"):
        next(stream.as_ray_dataset().streaming_split(1)[0])
