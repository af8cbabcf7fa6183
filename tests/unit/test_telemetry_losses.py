"""What a SIGKILL takes with it is counted, and is one interval at the most."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lepton import telemetry
from lepton.cli import main
from lepton.pipeline.tracing import find_trace
from lepton.telemetry import Carrier, Loss, ledger, losses_of, lost_spans, spans_of
from lepton.telemetry.rounds import rounds
from lepton.telemetry.spans import Growing
from tests.unit.collector import Collector

KILLED = """
import os, signal, sys, time
from lepton import telemetry
from lepton.telemetry import spool
telemetry.name_process("worker 1")
parent = telemetry.Carrier(sys.argv[1], sys.argv[2])
"""
BULK = """
spool.EVERY_S = 3600
kept = telemetry.Spool(sys.argv[2])
for n in range(100):
    kept.add("lepton.request", parent, 1)
kept.flush()
for n in range(3):
    kept.add("lepton.request", parent, 1)
"""
UNDER_WAY = """
kept = telemetry.span("lepton.train", parent)
kept.__enter__()
telemetry.record("lepton.read", parent, 1, 2)
"""
LOSES = """
telemetry.record("lepton.read", parent, 1, 2)
spool.EVERY_S = 3600
telemetry.Spool(sys.argv[2]).add("lepton.read", parent, 1)
"""
WINDOW = """
pace = telemetry.Pace(parent)
now = time.time_ns()
for n in range(50):
    pace.add(telemetry.Paced(n + 1, now, now, now, 10, (1, 2)))
pace.tell(False)
"""
UNSENT = """
for n in range(4):
    telemetry.record("lepton.read", parent, 1, 2)
telemetry.flush(30_000)
for n in range(5):
    telemetry.record("lepton.read", parent, 1, 2)
"""
AT_RANDOM = """
import mmap, os, random, signal, sys, time
import numpy
from lepton import telemetry
from lepton.telemetry import Common, Spool, losses_of, spans_of
folder = sys.argv[1]
Spool(folder).leave(Common("lepton.request"), "", 1, 2)  # telemetry has begun before the forks
BEGUN, DONE, FLUSHED, BEFORE = range(4)
def record(cells):
    kept, common = Spool(folder), Common("lepton.request", attributes={"lepton.rows": 1})
    flush = kept.flush
    def noted():
        cells[BEFORE], cells[FLUSHED] = cells[FLUSHED], cells[BEGUN]
        flush()
    kept.flush = noted
    while True:
        cells[BEGUN] += 1
        kept.leave(common, "", time.time_ns(), time.time_ns())
        cells[DONE] += 1
        time.sleep(0.001 * (cells[DONE] % 5 == 0))
for _ in range(3):
    cells = memoryview(mmap.mmap(-1, 4096)).cast("Q")
    child = os.fork()
    if child == 0:
        record(cells)
    try:
        while cells[DONE] == 0:
            time.sleep(0.001)
        time.sleep(random.random() / 3)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    kept = sum(s.process.endswith(f"({child})") for s in spans_of(folder))
    lost = sum(k.lost for k in losses_of(folder) if k.process.endswith(f"({child})"))
    told = (*cells[:4], kept, lost)
    assert cells[DONE] <= kept + lost <= cells[BEGUN], told
    assert lost <= cells[BEGUN] - cells[BEFORE], told
    print("killed")
"""
END = "\nos.kill(os.getpid(), signal.SIGKILL)"


def _ours(folder: Path, kind: str = "jsonl") -> Path:
    return ledger.file_of(str(folder), kind)


def _kill(script: str, folder: Path, end: str = END, **more: str) -> str:
    """Run a script until it kills itself, under a span of this process; return its trace id."""
    with telemetry.span("lepton.demo", Carrier("", str(folder))) as above:
        given = [above.carrier.traceparent, str(folder)]
        done = subprocess.run(
            [sys.executable, "-c", KILLED + script + end, *given],
            env={**os.environ, **more},
            timeout=180,
            check=False,
        )
    assert done.returncode == (-signal.SIGKILL if end else 0)
    return above.carrier.trace_id


@pytest.mark.parametrize(
    ("script", "kept", "lost"),
    [(BULK, 100, 3), (UNDER_WAY, 2, 0), (WINDOW, 1, 0)],
    ids=["in bulk", "under way", "a window of steps"],
)
def test_what_a_kill_takes_is_counted(script: str, kept: int, lost: int, tmp_path: Path) -> None:
    trace_id = _kill(script, tmp_path)
    found = [s for s in spans_of(str(tmp_path), trace_id) if s.name != "lepton.demo"]

    assert len(found) == kept
    assert [k.lost for k in losses_of(str(tmp_path))] == ([lost] if lost else [])


def test_a_kill_at_any_moment_takes_one_interval_and_is_counted_to_the_span(tmp_path: Path) -> None:
    command = [sys.executable, "-c", AT_RANDOM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)

    assert done.stdout.split() == ["killed"] * 3, done.stderr


def test_a_killed_workers_window_is_there_as_it_stood(tmp_path: Path) -> None:
    trace_id = _kill(WINDOW, tmp_path)
    (window,) = [s for s in spans_of(str(tmp_path), trace_id) if s.name == "lepton.steps"]

    assert window.attributes["lepton.steps"] == window.attributes["lepton.step"] == 50
    assert window.attributes["lepton.rank"] == 1


def test_a_process_that_ends_well_loses_nothing_and_one_that_runs_may_yet_write(
    tmp_path: Path,
) -> None:
    ended = UNDER_WAY + "kept.__exit__(None, None, None)" + BULK + "telemetry.flush()"
    _kill(ended, tmp_path, end="")
    with telemetry.span("lepton.demo", Carrier("", str(tmp_path))) as above:
        Growing("lepton.steps", above.carrier, 1)
        assert losses_of(str(tmp_path)) == []
        (here,) = losses_of(str(tmp_path), ended=False)
        assert here.lost == 1


def test_what_no_collector_took_is_counted(tmp_path: Path) -> None:
    collector = Collector()
    try:
        slow = {"OTEL_BSP_SCHEDULE_DELAY": "3600000"}
        _kill(UNSENT, tmp_path, **collector.environment(**slow))
        assert len(collector.spans()) == 4
    finally:
        collector.close()

    (loss,) = losses_of(str(tmp_path))
    assert (loss.lost, loss.unsent) == (0, 5)


def test_it_is_said_with_the_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "home"
    trace_id = _kill(BULK.replace('"lepton.request"', '"lepton.read"'), home / "traces")
    main(["trace", trace_id, "--home", str(home)])

    (loss,) = find_trace(trace_id, str(home)).losses
    assert f"with a killed process: 3 spans of {loss.process} lost" in capsys.readouterr().out
    assert str(Loss(process="p", trace_id="", lost=1, unsent=2)) == (
        "1 span of p lost, 2 spans of p not sent"
    )


def test_a_process_is_told_from_another_one_with_its_id(tmp_path: Path) -> None:
    above = _kill(LOSES, tmp_path)
    (before,) = losses_of(str(tmp_path))
    ours = ledger.file_of(str(tmp_path), "count")
    (count,) = [path for path in tmp_path.glob("*.count") if path != ours]
    for kind in ("count", "jsonl"):  # as if that process had had the id of this one
        path = count.with_suffix(f".{kind}")
        again = ledger.file_of(str(tmp_path / "again"), kind)
        again.parent.mkdir(exist_ok=True)
        content = path.read_bytes()
        pid = re.search(rb'"pid":(\d+)', content)
        again.write_bytes(content.replace(pid[0], b'"pid":%d' % os.getpid()) if pid else content)
    folder = str(tmp_path / "again")
    assert losses_of(folder) == [before]  # though a process with that id runs

    telemetry.record("lepton.read", Carrier("", folder), 1, 2)
    assert losses_of(folder) == [before]
    assert before.trace_id == above
    assert len(spans_of(folder)) == 2
    assert len(list((tmp_path / "again").glob("*.count"))) == 2


def test_only_a_traces_own_processes_count_for_it(tmp_path: Path) -> None:
    trace_id = _kill(LOSES, tmp_path)

    assert lost_spans(str(tmp_path), Carrier(f"00-{trace_id}-{'ab' * 8}-01")) == 1
    assert lost_spans(str(tmp_path), Carrier(f"00-{'ab' * 16}-{'ab' * 8}-01")) == 0


def test_files_of_other_traces_are_not_read(tmp_path: Path) -> None:
    _kill(UNDER_WAY, tmp_path)
    (other,) = [path for path in tmp_path.glob("*.jsonl") if path != _ours(tmp_path)]
    other.unlink()
    other.mkdir()  # which cannot be read

    assert lost_spans(str(tmp_path), Carrier(f"00-{'ab' * 16}-{'ab' * 8}-01")) == 0
    with pytest.raises(IsADirectoryError):
        losses_of(str(tmp_path))


def test_a_process_of_another_machine_runs_until_it_was_silent_for_a_while(tmp_path: Path) -> None:
    _kill(LOSES, tmp_path)
    (count,) = [path for path in tmp_path.glob("*.count") if path != _ours(tmp_path, "count")]
    host = b'"host":"' + socket.gethostname().encode()
    count.write_bytes(count.read_bytes().replace(host, b'"host":"elsewhere')[: ledger.SIZE])

    assert losses_of(str(tmp_path)) == []
    long_ago = time.time() - 2 * ledger.SILENT_S
    os.utime(count, (long_ago, long_ago))
    assert [loss.lost for loss in losses_of(str(tmp_path))] == [1]


def test_a_process_that_runs_touches_its_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "BEAT_S", 0)
    telemetry.record("lepton.read", Carrier("", str(tmp_path)), 1, 2)
    path = ledger.file_of(str(tmp_path), "count")
    os.utime(path, (0, 0))
    rounds.make()

    assert ledger.has_beaten(path)


def test_a_damaged_ledger_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "h-1.count").write_bytes(b"short")
    (tmp_path / "h-2.count").write_bytes(b"\0" * 4096)

    assert losses_of(str(tmp_path)) == []
