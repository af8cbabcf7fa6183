"""What is delivered is what the table holds, row by row, however files and row groups are cut."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from deltalake import DeltaTable, WriterProperties, write_deltalake

import lepton
from lepton.errors import StreamError
from lepton.lake import Snapshot
from lepton.stream import Cursor, Digest, Part, Shard, Stream
from lepton.stream.memory import Pool
from lepton.stream.reader import ROW


def rows_of(ids: np.ndarray[Any, Any]) -> pa.Table:
    images = ids.astype(np.int32)[:, None] * 7 + np.arange(40, dtype=np.int32)
    return pa.table(
        {
            "id": ids,
            "half": (ids / 2).astype(np.float32),
            "odd": ids % 2 == 1,
            "image": pa.array(list(images), pa.list_(pa.int32())),
            "bytes": [int(i).to_bytes(4, "big") * 30 for i in ids],
            "text": [f"row {i}" for i in ids],
            "gap": pa.array([None if i % 5 == 0 else i for i in ids], pa.int64()),
        }
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """Three files of several row groups; 40 rows deleted from the middle one."""
    uri = str(tmp_path_factory.mktemp("lake") / "t")
    for first, last in ((0, 900), (900, 1500), (1500, 1523)):
        properties = WriterProperties(max_row_group_size=250)
        rows = rows_of(np.arange(first, last))
        write_deltalake(uri, rows, mode="append", writer_properties=properties)
    DeltaTable(uri).delete("id >= 1000 AND id < 1040")
    return lepton.table(uri)


CUTS = {
    "small table, decoded whole": {},
    "chunks of several row groups": {"stream.SMALL_BYTES": 0, "stream.WINDOW_BYTES": 10**6},
    "parts of row groups": {"stream.SMALL_BYTES": 0, "stream.WINDOW_BYTES": 30_000},
    "tiny parts": {"stream.SMALL_BYTES": 0, "stream.WINDOW_BYTES": 3000},
    "whole row groups": {"stream.SMALL_BYTES": 0, "stream.WINDOW_BYTES": 80_000},
}


@pytest.fixture(params=CUTS.values(), ids=CUTS.keys())
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in request.param.items():
        monkeypatch.setattr(f"lepton.stream.{name}", value)


def parts(shard: Shard) -> list[Part]:
    found: list[Part] = []
    while True:
        try:
            found.append(shard.next_part())
        except StopIteration:
            return found


def by_id(table: pa.Table) -> dict[int, dict[str, Any]]:
    return {row["id"]: row for row in table.to_pylist()}


@pytest.mark.parametrize("taken", [0, 3])
def test_wide_rows_arrive_also_where_some_are_null_or_of_another_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    def pictures(first: int, odd: bytes | None, at: int) -> pa.Table:
        blobs: list[bytes | None] = [i.to_bytes(4, "big") * 200 for i in range(first, first + 500)]
        blobs[at] = odd
        floats = np.arange(first, first + 500, dtype=np.float32)[:, None] + np.zeros(256, "f4")
        columns = {"id": range(first, first + 500), "blob": blobs, "vector": list(floats)}
        types = {"id": pa.int64(), "blob": pa.binary(), "vector": pa.list_(pa.float32())}
        return pa.table(columns, schema=pa.schema(types))

    uri = str(tmp_path / "t")
    whole = (0).to_bytes(4, "big") * 200
    for first, odd, at in ((0, whole, 0), (500, None, 180), (1000, b"short", 499)):
        properties = WriterProperties(max_row_group_size=50)
        write_deltalake(uri, pictures(first, odd, at), mode="append", writer_properties=properties)
    monkeypatch.setattr("lepton.stream.stream.SMALL_BYTES", 0)
    monkeypatch.setattr("lepton.stream.stream.WINDOW_BYTES", 100_000)
    stream = lepton.table(uri).stream(batch_size=64, lanes=3, seed=1)
    shard = stream.shard(0, 1)
    seen: dict[int, dict[str, Any]] = {}
    for _ in range(taken):
        seen |= by_id(shard.next_part().rows)
    for rank in range(2):
        again = stream.shard(rank, 2)
        again.load_state_dict(shard.state_dict())
        for part in parts(again):
            seen |= by_id(part.rows)

    assert seen == by_id(lepton.table(uri).to_arrow())


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.usefixtures("cut")
def test_every_value_of_every_row_arrives_once(table: Snapshot, shuffle: bool) -> None:
    stream = table.stream(batch_size=56, lanes=5, seed=3, shuffle=shuffle)
    whole = by_id(table.to_arrow())
    seen: dict[int, dict[str, Any]] = {}
    total = Digest()
    for rank in range(2):
        for part in parts(stream.shard(rank, 2)):
            seen |= by_id(part.rows)
            total += part.digest
            assert len(part.rows) == part.delivered == len(part.ids)

    assert seen == whole
    assert total == stream.expected(0)


@pytest.mark.usefixtures("cut")
def test_tensors_hold_what_arrow_holds(table: Snapshot) -> None:
    columns = ["id", "half", "odd", "image", "bytes", "text"]
    stream = table.stream(batch_size=64, lanes=3, columns=columns)
    arrow = list(stream.shard(1, 2, format="arrow"))
    for batch, rows in zip(stream.shard(1, 2), arrow, strict=True):
        assert batch["image"].dtype == torch.int32
        assert batch["image"].tolist() == rows["image"].to_pylist()
        assert batch["half"].tolist() == rows["half"].to_pylist()
        assert batch["odd"].tolist() == rows["odd"].to_pylist()
        assert batch["bytes"].to_pylist() == rows["bytes"].to_pylist()
        assert batch["text"].to_pylist() == rows["text"].to_pylist()


@pytest.mark.usefixtures("cut")
def test_identities_name_the_rows_they_come_with(table: Snapshot) -> None:
    files = table.load().files
    stored = [table.read_file(f).to_pydict() for f in files]
    name = {
        (f << 40) | position: row
        for f, rows in enumerate(stored)
        for position, row in zip(rows["__position__"], rows["id"], strict=True)
    }
    for part in parts(table.stream(batch_size=100, lanes=2, columns=["id"]).shard(0, 1)):
        assert [name[i] for i in part.ids.tolist()] == part.rows["id"].to_pylist()


@pytest.mark.parametrize("rows", [1, 55, 56, 700, 1480])
@pytest.mark.usefixtures("cut")
def test_resuming_delivers_the_same_batches_from_there_on(table: Snapshot, rows: int) -> None:
    stream = table.stream(batch_size=56, lanes=4, columns=["id", "image"])
    rest = {
        int(s): row["id"]
        for rank in range(3)
        for part in parts(stream.shard(rank, 3, Cursor(0, rows)))
        for s, row in zip(part.slots, part.rows.to_pylist(), strict=True)
    }
    whole = {
        int(s): row["id"]
        for part in parts(stream.shard(0, 1))
        for s, row in zip(part.slots, part.rows.to_pylist(), strict=True)
    }
    assert rest == {s: i for s, i in whole.items() if s >= rows}


def keep_some(table: pa.Table) -> pa.Table:
    return table.filter(pc.greater(pc.field("half"), 300.0) & pc.field("odd"))


def batches(stream: Stream, n: int) -> list[list[int]]:
    ranks = [parts(stream.shard(rank, n)) for rank in range(n)]
    return [
        sorted(i for part in step for i in part.rows["id"].to_pylist())
        for step in zip(*ranks, strict=True)
    ]


@pytest.mark.parametrize("transform", [keep_some, lambda t: t.filter(pc.field("half") > 20)])
@pytest.mark.usefixtures("cut")
def test_a_transform_may_drop_rows(table: Snapshot, transform: Any) -> None:
    plain = table.stream(batch_size=56, lanes=4)
    stream = table.stream(batch_size=56, lanes=4, transform=transform)
    one, three = batches(stream, 1), batches(stream, 3)
    expected = [
        sorted(set(ids) & set(transform(table.to_arrow())["id"].to_pylist()))
        for ids in batches(plain, 1)
    ]

    assert one == three == expected
    assert sum((p.digest for p in parts(stream.shard(0, 1))), Digest()) == plain.expected(0)
    assert stream.steps == plain.steps == len(one)


def test_a_transform_that_makes_rows_or_muddles_them_is_refused(table: Snapshot) -> None:
    def twice(rows: pa.Table) -> pa.Table:
        return pa.concat_tables([rows, rows])

    def reversed_some(rows: pa.Table) -> pa.Table:
        return rows.take(list(range(len(rows) - 2, -1, -1)))

    def no_table(rows: pa.Table) -> Any:
        return rows.to_pylist()

    for wrong in (twice, reversed_some, no_table):
        with pytest.raises(StreamError, match=f"keep the column '{ROW}'"):
            next(table.stream(batch_size=56, transform=wrong).shard(0, 1))


def test_a_batch_that_is_kept_is_never_written_over(table: Snapshot) -> None:
    kept: list[tuple[Any, list[int]]] = []
    for batch in table.stream(batch_size=16, lanes=4, columns=["id"]).shard(0, 1):
        kept.append((batch["id"], batch["id"].tolist()))

    assert all(tensor.tolist() == values for tensor, values in kept)


@pytest.mark.parametrize("rows", [1000, 300_000])
def test_memory_is_used_again_once_nothing_refers_to_it(rows: int) -> None:
    pool = Pool()
    first = pool.empty((rows, 8), np.int64)
    view = torch.from_numpy(first)[10:20]
    start = first.ctypes.data
    del first
    second = pool.empty((rows, 8), np.int64)
    second[:] = 1
    assert second.ctypes.data != start
    del view
    third = pool.empty((rows - 100, 8), np.float64)
    assert third.ctypes.data == start
    assert third.shape == (rows - 100, 8)


def test_a_batch_may_be_changed_in_place(table: Snapshot) -> None:
    for lanes in (1, 4):
        stream = table.stream(batch_size=16, lanes=lanes, columns=["id"], epochs=2)
        total = [0, 0]
        for part in parts(stream.shard(0, 1)):
            ids = part.batch["id"]
            total[part.epoch] += int(ids.sum())
            ids.zero_()
        assert total[0] == total[1] == sum(by_id(table.select(["id"]).to_arrow()))


def test_a_persons_own_collate_makes_the_batches(table: Snapshot) -> None:
    def collate(rows: pa.Table) -> list[str]:
        return [f"{t}!" for t in rows["text"].to_pylist()]

    stream = table.stream(batch_size=64, columns=["text"])
    found = [text for batch in stream.shard(0, 1, format=collate) for text in batch]

    assert sorted(found) == sorted(f"{t}!" for t in table.to_arrow()["text"].to_pylist())


def test_nulls_are_refused_as_tensors_and_delivered_as_arrow(table: Snapshot) -> None:
    stream = table.stream(batch_size=64, columns=["gap"])

    with pytest.raises(StreamError, match=r"column 'gap' holds \d+ nulls"):
        next(stream.shard(0, 1))
    rows = pa.concat_tables(list(stream.shard(0, 1, format="arrow")))
    assert sorted(rows["gap"].drop_null().to_pylist()) == [
        i for i in sorted(by_id(table.to_arrow())) if i % 5
    ]


def test_a_failure_names_the_row_group_and_the_cursor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lepton.stream.stream.SMALL_BYTES", 0)
    monkeypatch.setattr("lepton.stream.stream.WINDOW_BYTES", 4000)
    uri = str(tmp_path / "t")
    rows = pa.table({"x": np.random.default_rng(0).random(4000)})
    write_deltalake(uri, rows, writer_properties=WriterProperties(max_row_group_size=1000))
    snapshot = lepton.table(uri)
    file = tmp_path / "t" / snapshot.files()[0].path
    body = bytearray(file.read_bytes())
    body[17_000:24_000] = b"\xff" * 7000
    file.write_bytes(bytes(body))
    shard = snapshot.stream(batch_size=100, lanes=1).shard(0, 1)

    with pytest.raises(StreamError, match=r"(?s)row group \d+.*@0.*cursor: .*'rows': \d+"):
        for _ in shard:
            pass
    assert shard.state_dict()["rows"] % 100 == 0
