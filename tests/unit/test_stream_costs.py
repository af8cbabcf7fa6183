"""What resuming reads, what a plan takes, and how a table that no longer fits is told."""

import re
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import WriterProperties, write_deltalake

import lepton
from lepton.errors import StreamError
from lepton.lake import Snapshot
from lepton.stream import Cursor, Stream
from lepton.stream.assembly import Assembly
from lepton.stream.layout import FileRows, layout_of
from lepton.stream.memory import Pool
from lepton.stream.order import Layout, Order

LANES, GROUP_ROWS, ROWS = 4, 50, 15_000


@pytest.fixture(scope="module", params=[10, 300], ids=["10 files", "300 files"])
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """300 row groups of 50 rows, in so many files."""
    uri = str(tmp_path_factory.mktemp("lake") / "t")
    ids = np.arange(ROWS)
    rows = pa.table({"part": ids // (ROWS // request.param), "x": ids})
    properties = WriterProperties(max_row_group_size=GROUP_ROWS)
    write_deltalake(uri, rows, partition_by=["part"], writer_properties=properties)
    snapshot = lepton.table(uri).select(["x"])
    assert len(snapshot.files()) == request.param
    return snapshot


def settle() -> None:
    """Wait for what still reads: else it would be counted by the next test."""
    for thread in threading.enumerate():
        if thread.name.startswith("lepton-read"):
            thread.join(30)


@pytest.fixture
def groups_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills with the row groups that are decoded."""
    settle()
    found: list[int] = []
    whole, parts = pq.ParquetFile.read_row_groups, pq.ParquetFile.iter_batches

    def read_row_groups(self: Any, groups: list[int], **options: Any) -> Any:
        found.extend(groups)
        return whole(self, groups, **options)

    def iter_batches(self: Any, **options: Any) -> Any:
        found.extend(options["row_groups"])
        return parts(self, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", read_row_groups)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    return found


@pytest.mark.parametrize("percent", [0, 1, 50, 99])
@pytest.mark.parametrize("world_size", [1, 4])
def test_resuming_reads_two_windows_a_lane_at_the_most(
    table: Snapshot,
    groups_read: list[int],
    monkeypatch: pytest.MonkeyPatch,
    percent: int,
    world_size: int,
) -> None:
    monkeypatch.setattr("lepton.stream.stream.SMALL_BYTES", 0)
    monkeypatch.setattr("lepton.stream.stream.WINDOW_BYTES", GROUP_ROWS * 8)
    stream = table.stream(batch_size=40, lanes=LANES, engine="worker")
    assert len(stream.layout.live) == ROWS // GROUP_ROWS  # a window is a row group
    rows = ROWS * percent // 100 // 40 * 40 + 7  # in the midst of lane 0's rows of a batch
    assembly = Assembly(stream, 0, world_size, Pool())
    parts = assembly.parts(stream.feed(0, world_size), Cursor(0, rows))
    first = next(parts)[0]
    parts.close()
    settle()
    read = len(groups_read)

    assert first.places == range(rows, rows + 40 - rows % 40)
    assert 0 < read <= 2 * LANES // world_size + 2  # two more are read ahead


def synthetic(files: int, rows: int) -> Layout:
    described = (FileRows(i, rows) for i in range(files))
    return layout_of(described, 131_072, fine=False, window_rows=131_072)


def test_a_plan_over_100_000_files_and_10_billion_rows() -> None:
    tracemalloc.start()
    layout = synthetic(100_000, 100_000)
    order = Order(layout=layout, epoch=1, batch_size=4096, lanes=16)
    _ = order.steps, next(order.units(range(16)))
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert layout.rows == 10**10
    assert size < 64 * 2**20  # a few integers a file, whatever the rows
    assert peak < 512 * 2**20
    began = time.monotonic()
    for rows in np.random.default_rng(0).integers(0, 10**10, 50).tolist():
        for lane in range(16):
            begin = order.lane_consumed(lane, rows)
            unit = next(order.lane_units(lane, begin))
            assert unit.offset == begin
            (piece,) = order.window_pieces(unit.lane, unit.window)[:1]
            assert 0 <= piece.low < piece.high <= 100_000
    assert time.monotonic() - began < 20  # 800 windows; a search through the plan takes minutes


def test_a_plan_does_not_grow_with_rows() -> None:
    few, many = (synthetic(500, rows) for rows in (1000, 100_000))

    assert len(few.live) == len(many.live) == 500
    assert many.rows == 100 * few.rows


@pytest.mark.parametrize("small", [True, False])
def test_a_schema_that_no_longer_fits_is_told_with_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    if not small:
        monkeypatch.setattr("lepton.stream.stream.SMALL_BYTES", 0)
        monkeypatch.setattr("lepton.stream.stream.WINDOW_BYTES", 800)
    uri = tmp_path / "t"
    for first in (0, 400):
        lepton.write(pa.table({"x": np.arange(first, first + 400)}), uri)
    snapshot = lepton.table(uri)
    stream: Stream = snapshot.stream(batch_size=50, lanes=1, shuffle=False)
    second = snapshot.files()[1].path
    ids = int(snapshot.read_file(snapshot.files()[1])["x"][0].as_py())
    other = pa.table({"x": [f"no number {i}" for i in range(ids, ids + 400)]})
    pq.write_table(other, uri / second, row_group_size=100)
    shard = stream.shard(0, 1, format="arrow")
    seen: list[int] = []
    place = rf"{re.escape(second)}' \(row group \d\) of table '{re.escape(str(uri))}'@1"

    with pytest.raises(StreamError, match=rf"epoch 0.*{place}.*cursor: .*'rows': \d+"):
        seen.extend(i for batch in shard for i in batch["x"].to_pylist())
    assert len(seen) == shard.state_dict()["rows"]
    with pytest.raises(StreamError, match=place):
        next(shard)
