"""Delivery: nobody waits for a collector, what is lost is counted, ends send what waits."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lepton import telemetry
from lepton.telemetry import Carrier, delivery, exporters
from lepton.telemetry.delivery import Delivery
from tests.unit.collector import Collector, attributes_of

ENDING = """
import os, signal, sys, time
from lepton import telemetry
telemetry.record("first", telemetry.Carrier("", None), 1, 2)
telemetry.flush(60_000)
for n in range(1000):
    telemetry.record("some", telemetry.Carrier("", None), 1, 2, attributes={"n": n})
if sys.argv[1] == "sigterm":
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


SPOOLED = """
import os, signal
from lepton.telemetry import Carrier, Spool
import sys
spool = Spool(sys.argv[1])
for n in range(100):
    spool.add("some", Carrier("", None), 1, attributes={"n": n})
os.kill(os.getpid(), signal.SIGTERM)
"""


BEGUN_ELSEWHERE = """
import threading
from lepton import telemetry
begun = threading.Thread(target=telemetry.delivery.look_after_ends)
begun.start()
begun.join()
"""


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.close()


class Gate:
    """An exporter that takes batches only while it is open."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.taken: list[Any] = []

    def export(self, batch: Any) -> Any:
        if not self.open.is_set():
            return SimpleNamespace(name="FAILURE")
        self.taken.extend(batch)
        return SimpleNamespace(name="SUCCESS")


def _delivery(exporter: Any, most: int) -> Delivery:
    return Delivery("traces", lambda: exporter, most=most, batch=10, delay_s=0.01)


def test_what_a_collector_does_not_take_is_kept_in_bounds_and_counted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "PAUSE_S", 0.01)
    gate = Gate()
    waiting = _delivery(gate, 50)
    for n in range(1000):
        waiting.put(n)
    assert not waiting.flush(30)

    lost = waiting.dropped
    assert lost == 1000
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 2  # at first, and at the end
    assert "spans cannot be sent to http" in said[0]
    assert f"{lost} spans have not been taken" in said[1]


def test_what_waits_arrives_when_the_collector_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "PAUSE_S", 60)
    gate = Gate()
    waiting = _delivery(gate, 50)
    for n in range(50):
        waiting.put(n)
    gate.open.set()

    assert waiting.flush(30)
    assert gate.taken == list(range(50))
    assert waiting.dropped == 0


@pytest.mark.parametrize("is_open", [True, False])
def test_what_is_sent_as_one_counts_as_many(is_open: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "PAUSE_S", 0.01)
    gate = Gate()
    if is_open:
        gate.open.set()
    waiting = _delivery(gate, 10_000)
    for name in "abcde":
        waiting.put_all(name, 20)

    assert waiting.flush(30) is is_open
    assert "".join(gate.taken) == ("abcde" if is_open else "")
    assert waiting.dropped == (0 if is_open else 100)


def test_an_exporter_that_raises_is_one_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    class Raising:
        def export(self, batch: Any) -> Any:
            raise OSError("no such wire")

    waiting = _delivery(Raising(), 50)
    waiting.put(1)
    assert not waiting.flush(30)
    assert "OSError: no such wire" in caplog.text


@pytest.mark.parametrize(
    ("before", "how", "status"),
    [
        ("", "exit", 0),
        ("", "sigterm", -signal.SIGTERM),
        ("import signal; signal.signal(signal.SIGTERM, lambda *_: exit(7))", "sigterm", 7),
        (BEGUN_ELSEWHERE, "sigterm", -signal.SIGTERM),
    ],
)
def test_an_end_sends_what_waits(before: str, how: str, status: int, collector: Collector) -> None:
    done = subprocess.run(
        [sys.executable, "-c", before + ENDING, how],
        env=collector.environment(OTEL_BSP_SCHEDULE_DELAY="3600000"),
        timeout=180,
        check=False,
    )

    assert done.returncode == status
    assert [attributes_of(s).get("n") for s in collector.spans()] == [None, *range(1000)]


def test_a_collector_that_is_wrong_is_said_once_and_the_end_is_not_held_up() -> None:
    wrong = Collector(status=404)
    done = subprocess.run(
        [sys.executable, "-c", ENDING, "exit"],
        env=wrong.environment(),
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    wrong.close()

    said = done.stderr.splitlines()
    assert sum("said once" in line for line in said) == 1
    assert "404" in said[0]
    assert "1001 spans have not been taken" in said[-1]
    assert not wrong.spans()


def test_a_metric_tells_what_was_given_up(collector: Collector) -> None:
    refusing = Collector(status=400)
    subprocess.run(
        [
            sys.executable,
            "-c",
            f"{ENDING}\ntelemetry.measuring()\ntelemetry.flush()\ntelemetry.flush()",
            "exit",
        ],
        env=collector.environment(OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=f"{refusing.url}/v1/traces"),
        timeout=180,
        check=True,
    )
    refusing.close()

    (point,) = collector.metrics()["lepton.telemetry.dropped"].sum.data_points
    assert point.as_int == 1001
    assert attributes_of(point) == {"lepton.signal": "traces"}


def test_an_unsampled_trace_records_nothing_but_what_must_not_be_missed(tmp_path: Path) -> None:
    parent = Carrier(f"00-{'ab' * 16}-{'cd' * 8}-00", str(tmp_path))
    quiet = telemetry.record("lepton.request", parent, 1, 2, attributes={"a": 1})
    with telemetry.span("lepton.use", parent) as asked:
        pass
    assert quiet.traceparent.endswith("-00")
    assert asked.carrier.traceparent.endswith("-00")
    assert telemetry.spans_of(str(tmp_path)) == []

    telemetry.record("lepton.request", parent, 1, 2, error="OSError")
    telemetry.record("lepton.request", parent, 1, 2, certain=True)
    telemetry.record("lepton.request", parent, 1, 2, error="BadRequest", certain=False)
    with telemetry.span("lepton.promote", parent):
        pass
    with (
        pytest.raises(OSError, match="x"),
        telemetry.span("outer", parent) as outer,
        telemetry.span("inner", outer.carrier),
    ):
        raise OSError("x")
    found = telemetry.spans_of(str(tmp_path), "ab" * 16)
    assert sorted(s.name for s in found) == [
        "inner", "lepton.promote", "lepton.request", "lepton.request", "outer",
    ]  # fmt: skip
    by_name = {s.name: s for s in found}
    assert by_name["inner"].parent_id == by_name["outer"].span_id == outer.carrier.span_id
    assert by_name["inner"].status == "error"


def test_a_ratio_is_obeyed(tmp_path: Path, collector: Collector) -> None:
    script = ENDING.replace('"", None', f'"", {str(tmp_path)!r}')
    subprocess.run(
        [sys.executable, "-c", script, "exit"],
        env={**os.environ, "OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0"},
        timeout=180,
        check=True,
    )

    assert telemetry.spans_of(str(tmp_path)) == []


@pytest.mark.parametrize("disabled", ["false", "true"])
def test_an_end_writes_what_is_spooled_unless_all_is_disabled(
    disabled: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SPOOLED, str(tmp_path)],
        env={**os.environ, "OTEL_SDK_DISABLED": disabled},
        timeout=180,
        check=False,
    )

    assert done.returncode == -signal.SIGTERM
    written = [s.attributes["n"] for s in telemetry.spans_of(str(tmp_path))]
    assert sorted(written) == ([] if disabled == "true" else list(range(100)))


@pytest.mark.parametrize(
    ("status", "answer", "taken"),
    [
        (200, b"", True),
        (200, b"\xff\xfe, which is no answer of OTLP's", True),
        (400, b"", False),
        (429, b"", False),
        (500, b"", False),
        (500, b"<html>" + b"x" * 10_000, False),
    ],
    ids=["slow", "garbage", "refusing", "busy", "broken", "broken at length"],
)
def test_nobody_waits_for_a_collector_that_is_slow_or_wrong(
    status: int,
    answer: bytes,
    taken: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    slow = Collector(status)
    slow.answer = answer
    slow.go.clear()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", slow.url)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1" if status == 429 else "60")
    monkeypatch.setattr(delivery, "PAUSE_S", 0.01)
    waiting = Delivery("traces", exporters.spans, most=50, batch=10, delay_s=0.01)
    waiting.put(b"")
    assert slow.wait_for(lambda c: c.requests == 1)
    for _ in range(1000):
        waiting.put(b"")  # while the collector has answered nobody
    assert slow.requests == 1 or status == 429  # it is asked again for as long as it may take
    assert waiting.dropped == 950  # no more than 50 wait
    slow.go.set()
    waiting.flush(60)
    slow.close()

    assert waiting.dropped == (950 if taken else 1001)
    assert sum("said once" in r.getMessage() for r in caplog.records) == (not taken)
