"""Span files where the disk is full, lines are cut, and texts are strange: nobody else fails."""

import shutil
from pathlib import Path

import pytest

from lepton import telemetry
from lepton.telemetry import Carrier, Common, Spool, ledger, losses_of, spans_of, store
from lepton.telemetry.store import SpanFile

FULL = Path("/dev/full")


def _record(folder: Path, name: str = "some", **attributes: object) -> None:
    telemetry.record(name, Carrier("", str(folder)), 1, 2, attributes=attributes)


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
def test_a_full_disk_is_said_once_and_fails_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = ledger.file_of(str(tmp_path), "jsonl")
    file.symlink_to(FULL)
    for _ in range(3):
        _record(tmp_path)
    with telemetry.span("outer", Carrier("", str(tmp_path))):
        pass
    said = [r.getMessage() for r in caplog.records if "cannot be written" in r.getMessage()]
    assert len(said) == 1
    assert str(file) in said[0]
    assert "No space left" in said[0]


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
def test_spans_are_written_again_when_there_is_room(tmp_path: Path) -> None:
    file = ledger.file_of(str(tmp_path), "jsonl")
    file.symlink_to(FULL)
    spans = Spool(str(tmp_path))
    spans.leave(Common("lost"), "", 1, 2)
    spans.flush()
    file.unlink()
    spans._file = SpanFile(str(tmp_path))  # as a process begins anew: the old file stays open
    spans.leave(Common("kept"), "", 1, 2)
    spans.close()
    assert [s.name for s in spans_of(str(tmp_path))] == ["kept"]


def test_a_cut_line_hides_no_other(tmp_path: Path) -> None:
    _record(tmp_path, "first")
    file = ledger.file_of(str(tmp_path), "jsonl")
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:40] + b"\n\n[]\n" + whole.replace(b"first", b"again"))
    (tmp_path / "other.jsonl").write_bytes(whole[: len(whole) // 2])
    (found,) = spans_of(str(tmp_path))
    assert found.name == "again"
    assert spans_of(str(tmp_path), found.trace_id) == [found]


@pytest.mark.parametrize("cut", [0, 40])
def test_a_line_that_a_process_before_left_half_hides_no_other(cut: int, tmp_path: Path) -> None:
    _record(tmp_path, "first")
    file = ledger.file_of(str(tmp_path), "jsonl")
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:cut])  # begun anew, a container has processes of the same ids
    fresh = whole.replace(b"first", b"fresh").replace(b'"span_id":"', b'"span_id":"f')
    SpanFile(str(tmp_path)).append([fresh])

    assert sorted(s.name for s in spans_of(str(tmp_path))) == ["first", "fresh"]
    assert file.read_bytes().count(b"\n") == 2 + (cut > 0)


def test_a_text_with_strange_line_ends_stays_one_line(tmp_path: Path) -> None:
    strange = "a\u2028b\x85c\nd\x0be"
    _record(tmp_path, note=strange)
    (found,) = spans_of(str(tmp_path))
    assert found.attributes["note"] == strange


def test_a_text_that_is_none_loses_its_span_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _record(tmp_path, "lost", number=2**70)
    _record(tmp_path, "kept")
    assert [s.name for s in spans_of(str(tmp_path))] == ["kept"]
    assert "'lost' cannot be encoded" in caplog.text


def test_a_files_room_is_bounded_and_what_is_let_go_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MOST_BYTES", 20_000)
    monkeypatch.setattr(store, "LOOK_S", 0.0)
    both = [Spool(str(tmp_path)) for _ in range(2)]  # as of two models in one replica
    recorded = 0
    for n in range(30):
        for spans in both:
            for at in range(20):
                spans.leave(Common("lepton.request"), "", 10**18 + n, 10**18 + at)
            spans.flush()
        _record(tmp_path, "lepton.read")  # by another writer of this process
        recorded += 41
    for spans in both:
        spans.close()

    kept = len(spans_of(str(tmp_path)))
    files = sorted(tmp_path.glob("*.jsonl"))
    assert 20 < kept < recorded
    assert len(files) == 2
    assert all(file.stat().st_size < 30_000 for file in files)
    assert losses_of(str(tmp_path), ended=False) == []
    told = ledger.read(ledger.file_of(str(tmp_path), "count"))
    assert told is not None
    assert told[1] == kept


def test_a_folder_that_is_deleted_meanwhile_is_made_again(tmp_path: Path) -> None:
    _record(tmp_path / "traces", "first")
    shutil.rmtree(tmp_path / "traces")
    _record(tmp_path / "traces", "second")

    assert [s.name for s in spans_of(str(tmp_path / "traces"))] == ["second"]
