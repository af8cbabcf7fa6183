"""Memory stays bounded where rows are much larger decoded than stored."""

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from deltalake import WriterProperties, write_deltalake

import lepton
from lepton.lake import Snapshot
from lepton.lake.read import bytes_per_row
from lepton.stream.layout import swelling_of
from lepton.stream.order import Order

ROWS = 60_000


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """Text of 2,000 bytes of which there are 200: 120 MB decoded, a thousandth of it stored."""
    uri = str(tmp_path_factory.mktemp("lake") / "t")
    texts = pa.array([f"{i:04}" * 500 for i in range(200)])
    for seed in (0, 1):
        which = np.random.default_rng(seed).integers(0, 200, ROWS // 2)
        rows = pa.table({"id": np.arange(ROWS // 2), "text": texts.take(pa.array(which))})
        properties = WriterProperties(max_row_group_size=10_000)
        write_deltalake(uri, rows, mode="append", writer_properties=properties)
    return lepton.table(uri)


def size_of(snapshot: Snapshot) -> tuple[float, float]:
    version = snapshot.load()
    return bytes_per_row(version, version.files[0], snapshot.schema.names)


def most_rows(order: Order) -> int:
    return max(unit.rows for unit in order.units(range(order.lanes)))


def test_text_that_repeats_is_measured_decoded(repeated: Snapshot) -> None:
    began = time.monotonic()
    stored, decoded = size_of(repeated)

    assert time.monotonic() - began < 1.0
    assert stored < 60
    assert 2000 <= decoded <= 2050


def test_windows_of_text_that_repeats_stay_within_the_bound(repeated: Snapshot) -> None:
    stream = repeated.stream(batch_size=256, lanes=8)

    assert not stream.layout.fine  # 120 MB are not kept decoded
    assert most_rows(stream.order(0)) * 2012 <= 2 * 8 * 2**20
    texts = sum(len(b) for b in stream.shard(0, 1, format="arrow"))
    assert texts == ROWS
    assert stream.expected(0).rows == ROWS


def test_another_way_to_cut_a_table_is_another_order(
    repeated: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    swollen = repeated.stream(batch_size=256).fingerprint
    monkeypatch.setattr("lepton.stream.stream.swelling_of", lambda *_: 1)
    stored = repeated.stream(batch_size=256).fingerprint

    assert swollen != stored
    assert stored == repeated.stream(batch_size=256).fingerprint


def test_tables_that_are_cut_as_before_keep_their_order(tmp_path: Path) -> None:
    kinds = np.array(["a", "b"])[np.arange(3000) % 2]
    snapshot = lepton.write(pa.table({"kind": kinds}), tmp_path / "t")
    stream = snapshot.stream(batch_size=64)

    stored, decoded = size_of(snapshot)
    assert swelling_of(stored, decoded) > 1
    assert stream.layout.fine
    assert stream._swollen() == []


def test_rows_that_are_stored_as_they_are_do_not_swell(tmp_path: Path) -> None:
    blobs = [np.random.default_rng(i).bytes(300) for i in range(500)]
    lists = list(np.random.default_rng(0).random((500, 20)))
    snapshot = lepton.write(pa.table({"blob": blobs, "list": lists}), tmp_path / "t")
    stored, decoded = size_of(snapshot)

    assert decoded == pytest.approx(stored, rel=0.2)
    assert [swelling_of(1, d) for d in (0.5, 1.9, 2, 3.9, 4, 100)] == [1, 1, 2, 4, 4, 128]
    assert swelling_of(0.0, 1.0) == 1
