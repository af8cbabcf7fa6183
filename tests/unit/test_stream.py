"""Streams over real tables: one order at any world size, resumable anywhere, errors that help."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

import lepton
from lepton.errors import StreamError
from lepton.lake import Snapshot
from lepton.preprocess import Preparation
from lepton.stream import Cursor, Digest, Part, Shard
from lepton.stream.tensors import batch_of, pinned

TABLES = Path(__file__).parents[1] / "data" / "delta-tables"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    uri = tmp_path_factory.mktemp("lake") / "t"
    for first, last in ((0, 150), (150, 300), (300, 403)):
        ids = np.arange(first, last)
        rows = {
            "id": ids,
            "x": list(ids[:, None] * np.ones(3)),
            "split": np.where(ids % 5, "a", "b"),
        }
        lepton.write(pa.table(rows), uri, partition_by=["split"])
    return lepton.table(uri)


def parts(shard: Shard) -> Iterator[Part]:
    while True:
        try:
            yield shard.next_part()
        except StopIteration:
            return


FILTERS = [None, "split = 'a'", "id > 90", "split = 'a' AND id < 300"]


@pytest.mark.parametrize("condition", FILTERS)
def test_the_batches_are_the_same_at_any_world_size(table: Snapshot, condition: str | None) -> None:
    rows = table if condition is None else table.where(condition)
    stream = rows.stream(batch_size=48, seed=3, epochs=2, lanes=16)
    expected = [stream.expected(0), stream.expected(1)]
    seen: set[str] = set()
    for n in (1, 2, 3, 4, 5, 6, 7, 8, 16) if condition is None else (1, 3, 16):
        found, batches = [Digest(), Digest()], []
        shards = [parts(s) for s in (stream.shard(r, n, format="arrow") for r in range(n))]
        for step in zip(*shards, strict=True):
            for part in step:
                found[part.epoch] += part.digest
            batches.append(sorted(i for p in step for i in p.rows["id"].to_pylist()))
            assert sum(len(p.rows) for p in step) == step[0].global_rows
        assert found == expected
        assert len(batches) == stream.steps
        seen.add(repr(batches))
    assert len(seen) == 1
    assert expected[0].rows == rows.count_rows()
    assert expected[0] != expected[1]


def test_resuming_from_any_row_at_another_world_size_gives_the_rest(table: Snapshot) -> None:
    stream = table.stream(batch_size=50, epochs=1, lanes=4)
    whole = {
        int(s): int(i)
        for p in parts(stream.shard(0, 1))
        for s, i in zip(p.slots, p.ids, strict=True)
    }
    for rows in (1, 49, 50, 51, 133, 402):
        shards = [stream.shard(r, 3, Cursor(0, rows)) for r in range(3)]
        lengths = {len(s) for s in shards}
        got = [list(parts(s)) for s in shards]
        rest = {
            int(s): int(i) for ps in got for p in ps for s, i in zip(p.slots, p.ids, strict=True)
        }

        assert rest == {s: i for s, i in whole.items() if s >= rows}
        assert lengths == {len(ps) for ps in got}


def test_a_state_is_equal_on_every_rank_and_taken_up_at_any_size(table: Snapshot) -> None:
    stream = table.stream(batch_size=100, epochs=2, lanes=4)
    two = [stream.shard(r, 2) for r in range(2)]
    for _ in range(6):
        for shard in two:
            next(shard)
    states = [s.state_dict() for s in two]
    one = stream.shard(0, 1)
    one.load_state_dict(states[0])

    assert states[0] == states[1]
    assert states[0]["epoch"] == 1
    assert len(list(one)) == stream.steps - 6
    with pytest.raises(StreamError, match="another order"):
        table.stream(batch_size=100, seed=9, epochs=2, lanes=4).shard(0, 1, states[0])


def test_a_table_with_deletion_vectors_streams_its_live_rows() -> None:
    rows = lepton.table(TABLES / "dv-partitioned-with-checkpoint" / "table")
    stream = rows.stream(batch_size=8, lanes=3)
    found = Digest()
    for rank in range(3):
        for part in parts(stream.shard(rank, 3)):
            found += part.digest

    assert found == stream.expected(0)
    assert found.rows == 35


def test_without_shuffle_one_lane_keeps_the_order_of_the_files(table: Snapshot) -> None:
    stream = table.stream(batch_size=64, lanes=1, shuffle=False)
    ids = [i for batch in stream.shard(0, 1, format="arrow") for i in batch["id"].to_pylist()]

    assert ids == table.to_arrow()["id"].to_pylist()


def test_transforms_see_rows_not_bookkeeping_and_keep_the_count(table: Snapshot) -> None:
    prepare = Preparation.fit(table, standard=["id"])
    stream = table.stream(batch_size=100, columns=["id"], transform=prepare)
    batch = next(stream.shard(0, 1))
    short = table.stream(
        batch_size=100, columns=["id"], transform=lambda t: pa.table({"id": t["id"][1:]})
    )

    assert list(batch) == ["id"]
    assert batch["id"].dtype == torch.float32
    with pytest.raises(StreamError, match="must return an Arrow table with the same rows"):
        next(short.shard(0, 1))


def test_a_short_tail_leaves_some_ranks_without_rows_but_not_without_a_step(tmp_path: Path) -> None:
    rows = lepton.write(pa.table({"x": np.arange(9.0), "s": list("abcdefghi")}), tmp_path / "t")
    stream = rows.stream(batch_size=8, lanes=4)
    last = [list(stream.shard(r, 4))[-1] for r in range(4)]

    assert [len(b["x"]) for b in last] == [1, 0, 0, 0]
    assert all(list(b) == ["x", "s"] for b in last)


def test_one_epoch_at_a_time_as_ray_data_does(table: Snapshot) -> None:
    shard = table.stream(batch_size=100, epochs=2).shard(0, 1)

    assert sum(len(b["id"]) for b in shard.iter_torch_batches()) == 403
    assert sum(len(b["id"]) for b in shard.iter_torch_batches(batch_size=100)) == 403
    assert list(shard.iter_torch_batches()) == []
    with pytest.raises(ValueError, match="global batch size is 100"):
        next(iter(shard.iter_torch_batches(batch_size=7)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"batch_size": 4, "lanes": 8}, "smaller than lanes"),
        ({"batch_size": 4, "epochs": 0}, "epochs must be"),
        ({"batch_size": 4, "engine": "magic"}, "engine 'magic'"),
        ({"batch_size": True}, "batch_size must be a whole number"),
    ],
)
def test_options_that_cannot_be(table: Snapshot, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table.stream(**options)


def test_more_ranks_than_lanes_and_unknown_columns_are_refused(table: Snapshot) -> None:
    with pytest.raises(ValueError, match="pass lanes=9"):
        table.stream(batch_size=16).shard(0, 9)
    with pytest.raises(lepton.LeptonError, match="has no column nope"):
        table.stream(batch_size=16, columns=["nope"])


def test_a_vanished_file_stops_the_stream_by_name(tmp_path: Path) -> None:
    rows = lepton.write(pa.table({"x": np.arange(9.0)}), tmp_path / "t")
    (tmp_path / "t" / rows.files()[0].path).unlink()

    with pytest.raises(StreamError, match=rf"epoch 0.*{rows.files()[0].path}.*@0"):
        list(rows.stream(batch_size=3, lanes=1).shard(0, 1))


def test_arrow_columns_become_tensors_of_their_shape() -> None:
    grid = pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(12.0).reshape(2, 3, 2))
    batch = batch_of(
        pa.table(
            {
                "n": pa.array([1, 2], pa.int16()),
                "b": pa.array([True, False]),
                "l": pa.array([[1.0, 2.0], [3.0, 4.0]]),
                "g": grid,
                "s": ["x", "y"],
            }
        )
    )

    assert batch["n"].dtype == torch.int16
    assert batch["b"].tolist() == [True, False]
    assert batch["l"].shape == (2, 2)
    assert batch["g"].shape == (2, 3, 2)
    assert batch["s"].to_pylist() == ["x", "y"]
    for wrong in ([1.0, None], [[1.0], [1.0, 2.0]], [[1.0], None]):
        with pytest.raises(StreamError, match="column 'w'"):
            batch_of(pa.table({"w": wrong}))


def test_a_changed_copy_has_an_order_of_its_own(table: Snapshot) -> None:
    first = table.stream(batch_size=50, seed=1)
    hashes = {str(first.expected(0))}
    for change in (
        {"seed": 2},
        {"batch_size": 40},
        {"lanes": 3},
        {"snapshot": table.where("id > 9")},
    ):
        hashes.add(str(replace(first, **change).expected(0)))

    assert len(hashes) == 5
    assert first.read_by("worker", None).expected(0) == first.expected(0)


def test_a_stream_that_follows_moves_between_epochs_and_resumes_where_it_was(
    tmp_path: Path,
) -> None:
    first = lepton.write(pa.table({"id": np.arange(90)}), tmp_path / "t")
    stream = first.where("id <> 3").stream(batch_size=20, epochs=3, follow=True)
    shard = stream.shard(0, 1, format="arrow")
    seen = [next(shard)["id"].to_pylist()]
    lepton.write(pa.table({"id": np.arange(90, 130)}), tmp_path / "t")
    seen += [next(shard)["id"].to_pylist() for _ in range(4)]
    middle = next(shard)["id"].to_pylist()
    state = shard.state_dict()
    lepton.write(pa.table({"id": np.arange(130, 150)}), tmp_path / "t")
    rest = [batch["id"].to_pylist() for batch in shard]
    again = lepton.table(tmp_path / "t", version=0).where("id <> 3")
    resumed = again.stream(batch_size=20, epochs=3, follow=True).shard(0, 1, state, format="arrow")

    assert sorted(i for b in seen for i in b) == [i for i in range(90) if i != 3]
    assert state["version"] == 1
    assert sorted(middle + [i for b in rest[:6] for i in b]) == [i for i in range(130) if i != 3]
    assert sorted(i for b in rest[6:] for i in b) == [i for i in range(150) if i != 3]
    assert [batch["id"].to_pylist() for batch in resumed] == rest
    half = stream.shard(0, 1)
    next(half)
    with pytest.raises(StreamError, match="between epochs only"):
        half.move_to(0)


def test_ranks_that_follow_must_settle_on_a_version(tmp_path: Path) -> None:
    rows = lepton.write(pa.table({"id": np.arange(40)}), tmp_path / "t")
    two = rows.stream(batch_size=40, epochs=2, follow=True, lanes=2)
    shard = two.shard(0, 2)

    next(shard)
    with pytest.raises(StreamError, match=r"settle on one version.*cursor: .*'epoch': 1"):
        next(shard)
    shard = two.shard(0, 2)
    shard.agree = lambda version: version
    assert len(next(shard)["id"]) == len(next(shard)["id"]) == 20
    assert list(shard) == []
    with pytest.raises(ValueError, match="read by engine='worker'"):
        rows.stream(batch_size=4, follow=True, engine="ray_data")


def without_sevens(rows: pa.Table) -> pa.Table:
    return rows.filter(pc.not_equal(pc.bit_wise_and(rows["id"], 7), 7))


@pytest.mark.parametrize("condition", [None, "split = 'a' AND id > 20"])
@pytest.mark.parametrize("transform", [None, without_sevens])
def test_the_order_hash_is_the_same_for_any_number_of_ranks(
    table: Snapshot, condition: str | None, transform: Any
) -> None:
    rows = table if condition is None else table.where(condition)
    stream = rows.stream(batch_size=64, seed=4, lanes=16, transform=transform, columns=["id"])
    kept = rows.to_arrow() if transform is None else transform(rows.to_arrow())
    hashes: set[str] = set()
    for n in (1, 2, 3, 4, 5, 6, 7, 8, 16):
        ranks = [list(parts(stream.shard(r, n, format="arrow"))) for r in range(n)]
        assert {len(found) for found in ranks} == {stream.steps}
        hashes.add(str(sum((p.digest for found in ranks for p in found), Digest())))
        ids = [i for found in ranks for p in found for i in p.rows["id"].to_pylist()]
        assert sorted(ids) == sorted(kept["id"].to_pylist())

    assert hashes == {str(stream.expected(0))}


def image(number: int) -> bytes:
    """An 8x6 grey image, as a file that is compressed."""
    pixels = np.full((8, 6), number % 251, np.uint8)
    file = io.BytesIO()
    np.savez_compressed(file, pixels=pixels)
    return file.getvalue()


def decoded(rows: pa.Table) -> pa.Table:
    """What a person's transform does that opens image files."""
    files = (np.load(io.BytesIO(data)) for data in rows["image"].to_pylist())
    pixels = np.stack([file["pixels"] for file in files])
    tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(pixels)
    return rows.set_column(rows.column_names.index("image"), "image", tensor)


def test_a_transform_decodes_images(tmp_path: Path) -> None:
    rows = {"id": np.arange(90), "image": [image(i) for i in range(90)]}
    stream = lepton.write(pa.table(rows), tmp_path / "t").stream(
        batch_size=16, lanes=4, transform=decoded
    )
    seen: list[int] = []
    for rank in range(4):
        for batch in stream.shard(rank, 4):
            assert batch["image"].shape == (len(batch["id"]), 8, 6)
            assert batch["image"].dtype == torch.uint8
            assert (batch["image"] == (batch["id"] % 251)[:, None, None]).all()
            seen += batch["id"].tolist()

    assert sorted(seen) == list(range(90))


def test_batches_lie_in_page_locked_memory_where_it_is_asked_for(
    table: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's allocator is played: batches must lie in what it gives, and hold what they would."""
    given: list[Any] = []

    def page_locked(size: int) -> Any:
        given.append(np.empty(size, np.uint8))
        return given[-1]

    monkeypatch.setattr("lepton.stream.shard.pinned", lambda: page_locked)
    stream = table.stream(batch_size=50, columns=["id", "x"], lanes=4)
    shard, plain = stream.shard(0, 1), stream.shard(0, 1)
    shard.pin = True
    for batch, other in zip(shard, plain, strict=True):
        for name, tensor in batch.items():
            at = tensor.data_ptr()
            starts = [(a.ctypes.data, a.nbytes) for a in given]
            assert any(start <= at < start + size for start, size in starts), name
            assert torch.equal(tensor, other[name])


def test_page_locked_memory_is_left_alone_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def empty(size: int, **options: Any) -> torch.Tensor:
        asked.append(options)
        return torch.zeros(size, dtype=torch.uint8)

    monkeypatch.setattr(torch, "empty", empty)
    for there in (False, True):
        pinned.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        make = pinned()
        assert (make is not None) == there
    assert make is not None
    assert make(100).nbytes == 100
    assert asked == [{"dtype": torch.uint8, "pin_memory": True}]
    pinned.cache_clear()
