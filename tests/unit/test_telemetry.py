"""Spans: one trace across processes, kept after a kill, sent by OTLP."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lepton import telemetry
from lepton.telemetry import Carrier, carrier_of, traceparent_in
from tests.unit.collector import Collector

CHILD = """
import sys
from lepton import telemetry
parent = telemetry.Carrier(sys.argv[1], sys.argv[2] or None)
with telemetry.span("child", parent, attributes={"n": 1}):
    pass
telemetry.flush()
print("ended", flush=True)
sys.stdin.read()
"""


def test_a_trace_goes_through_processes_and_survives_a_kill(tmp_path: Path) -> None:
    with telemetry.span("parent", Carrier("", str(tmp_path))) as parent:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, parent.carrier.traceparent, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "ended\n"
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()

    found = {s.name: s for s in telemetry.spans_of(str(tmp_path), parent.carrier.trace_id)}
    assert found["child"].parent_id == found["parent"].span_id
    assert found["child"].process != found["parent"].process
    assert found["child"].attributes == {"n": 1}


def test_errors_and_links_are_recorded_without_payloads(tmp_path: Path) -> None:
    other = telemetry.record("other", Carrier("", str(tmp_path)), 1, 2)
    with (
        pytest.raises(KeyError),
        telemetry.span("failing", Carrier("", str(tmp_path)), links=[other.traceparent, "junk"]),
    ):
        raise KeyError("a secret")

    failing = next(s for s in telemetry.spans_of(str(tmp_path)) if s.name == "failing")
    assert failing.status == "error"
    assert failing.attributes == {"error.type": "KeyError"}
    assert failing.links == [":".join(other.traceparent.split("-")[1:3])]


def test_a_malformed_header_starts_a_new_trace() -> None:
    good = f"00-{'ab' * 16}-{'cd' * 8}-01"
    fallback = Carrier("", "d")

    assert carrier_of(good, "d").trace_id == "ab" * 16
    assert carrier_of("00-xyz", "d", fallback) is fallback
    assert carrier_of(None, "d", fallback) is fallback
    assert traceparent_in(good.encode()) == traceparent_in(f" {good} ".encode()) == good
    assert [traceparent_in(h) for h in (None, b"", b"00-xyz", b"\xff")] == [""] * 4


def test_spans_reach_an_otlp_receiver() -> None:
    collector = Collector()
    parent = f"00-{'ab' * 16}-{'cd' * 8}-01"
    subprocess.run(
        [sys.executable, "-c", CHILD, parent, ""],
        env=collector.environment(),
        stdin=subprocess.DEVNULL,
        check=True,
        timeout=180,
    )
    collector.close()

    assert [(s.name, s.trace_id.hex()) for s in collector.spans()] == [("child", "ab" * 16)]
