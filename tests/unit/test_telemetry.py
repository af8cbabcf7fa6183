"""Spans: one trace across processes, kept after a kill, sent by OTLP."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from lepton import telemetry
from lepton.errors import TrainingError
from lepton.telemetry import Carrier, carrier_of, traceparent_in
from lepton.telemetry.baggage import entries_of
from tests.unit.collector import Collector

TRACE, SPAN = "ab" * 16, "cd" * 8

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


LONG = """
import sys, time
from lepton import telemetry
with telemetry.span("lepton.train", telemetry.Carrier("", sys.argv[1])) as run:
    time.sleep(0.05)
    with telemetry.span("lepton.plan", run.carrier):
        pass
    with telemetry.span("lepton.evaluate", run.carrier) as judging:
        time.sleep(0.05)
        telemetry.record("lepton.read", judging.carrier, time.time_ns())
        print("under way", flush=True)
        sys.stdin.read()
"""


def test_a_killed_driver_leaves_no_orphans(tmp_path: Path) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", LONG, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == "under way\n"
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()

    found = {s.name: s for s in telemetry.spans_of(str(tmp_path))}
    ids = {s.span_id for s in found.values()}
    assert [s.name for s in found.values() if s.parent_id not in ids] == ["lepton.train"]
    unfinished = {n for n, s in found.items() if s.attributes.get("lepton.unfinished")}
    assert unfinished == {"lepton.train", "lepton.evaluate"}
    last = found["lepton.read"].end_ns
    assert found["lepton.train"].end_ns == found["lepton.evaluate"].end_ns == last
    assert found["lepton.train"].end_ns - found["lepton.train"].start_ns > 90_000_000
    assert telemetry.losses_of(str(tmp_path)) == []


TRAINS = """
import sys
import numpy as np, pyarrow as pa, torch
import lepton
from lepton import telemetry

def loop(worker):
    net = torch.nn.Linear(3, 1)
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
    for batch in worker.batches():
        worker.step(net(batch["x"]).square().sum())
        if worker.step_number == 4:
            worker._saver.wait()
            print("step 4", flush=True)
            sys.stdin.read()

home = sys.argv[1]
x = np.random.default_rng(0).normal(size=(120, 3)).astype("float32")
stream = lepton.write(pa.table({"x": list(x)}), f"{home}/t").stream(batch_size=20, lanes=1)
with telemetry.span("lepton.demo", telemetry.Carrier("", f"{home}/traces")) as demo:
    lepton.train(loop, stream, name="r", home=home, checkpoint_every=2, trace=demo.carrier)
"""


def test_a_killed_training_script_leaves_no_orphans(tmp_path: Path) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", TRAINS, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == "step 4\n"
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()

    found = telemetry.spans_of(str(tmp_path / "traces"))
    ids = {s.span_id: s for s in found}
    assert [s.name for s in found if s.parent_id not in ids] == ["lepton.demo"]
    assert {"lepton.checkpoint", "lepton.read"} <= {s.name for s in found}
    (run,) = [s for s in found if s.name == "lepton.train"]
    assert run.attributes["lepton.unfinished"]
    assert run.end_ns >= max(s.end_ns for s in found if s.name == "lepton.checkpoint")
    assert ids[run.parent_id or ""].name == "lepton.demo"


def test_a_span_that_ends_is_told_once(tmp_path: Path) -> None:
    with telemetry.span("lepton.train", Carrier("", str(tmp_path))) as run:
        (under_way,) = telemetry.spans_of(str(tmp_path))
        run.set(lepton_steps=3)
        run.link(f"00-{TRACE}-{SPAN}-01")
        run.link("rubbish")
    (ended,) = telemetry.spans_of(str(tmp_path))

    assert under_way.attributes == {"lepton.unfinished": True}
    assert ended.span_id == under_way.span_id
    assert ended.attributes == {"lepton.steps": 3}
    assert ended.links == [f"{TRACE}:{SPAN}"]
    assert ended.end_ns > under_way.end_ns


def test_errors_and_links_are_recorded(tmp_path: Path) -> None:
    other = telemetry.record("other", Carrier("", str(tmp_path)), 1, 2)
    with (
        pytest.raises(TrainingError),
        telemetry.span("failing", Carrier("", str(tmp_path)), links=[other.traceparent, "junk"]),
    ):
        raise TrainingError("what lepton says" + 600 * "x" + "\na second line")

    failing = next(s for s in telemetry.spans_of(str(tmp_path)) if s.name == "failing")
    assert failing.status == "error"
    assert failing.attributes["error.type"] == "TrainingError"
    assert failing.attributes["exception.type"] == "lepton.errors.TrainingError"
    said = failing.attributes["exception.message"]
    assert said.startswith("what lepton says")
    assert "\n" not in said
    assert len(said) == 500
    assert failing.links == [":".join(other.traceparent.split("-")[1:3])]


def test_a_malformed_header_starts_a_new_trace() -> None:
    good = f"00-{'ab' * 16}-{'cd' * 8}-01"
    fallback = Carrier("", "d")

    assert carrier_of(good, "d").trace_id == "ab" * 16
    assert carrier_of("00-xyz", "d", fallback) is fallback
    assert carrier_of(None, "d", fallback) is fallback
    assert traceparent_in(good.encode()) == traceparent_in(f" {good} ".encode()) == good
    assert [traceparent_in(h) for h in (None, b"", b"00-xyz", b"\xff")] == [""] * 4


@pytest.mark.parametrize(
    "header",
    [
        f"00-{'0' * 32}-{SPAN}-01",  # no trace, by the standard
        f"00-{TRACE}-{'0' * 16}-01",  # no span
        f"ff-{TRACE}-{SPAN}-01",  # no version
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",  # which this version has none of
        f"00-{TRACE}-{SPAN}-0",
        f"00-{TRACE}-{SPAN}-011",
        f"00-{TRACE}-{SPAN}-",
        f"00-{TRACE}-{SPAN}",
        f"0-{TRACE}-{SPAN}-01",
        f"000-{TRACE}-{SPAN}-01",
        f"{TRACE}-{SPAN}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}a-{SPAN}-01",
        f"00-{TRACE[:-1]}g-{SPAN}-01",
        f"00-{SPAN}-{TRACE}-01",
        f"00_{TRACE}_{SPAN}_01",
        f"00-{TRACE}-{SPAN}-01,00-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01\x00",
        f"00-{chr(0xFF11) * 32}-{SPAN}-01",
        f"cc-{TRACE}-{SPAN}-01.more",
        "-" * 55,
        "0" * 55,
        f"00-{TRACE}-{SPAN}-01" * 1000,
    ],
)
def test_what_is_no_traceparent_begins_a_trace(header: str, tmp_path: Path) -> None:
    fallback = Carrier("", str(tmp_path))

    assert traceparent_in(header.encode("utf-8")) == ""
    assert carrier_of(header, str(tmp_path), fallback) is fallback
    with telemetry.span("root", Carrier(header, str(tmp_path))) as begun:
        assert begun.carrier.trace_id not in ("", TRACE, "0" * 32)
    (kept,) = telemetry.spans_of(str(tmp_path))
    assert kept.parent_id is None


@pytest.mark.parametrize(
    ("header", "read"),
    [
        (f"00-{TRACE}-{SPAN}-01", "01"),
        (f"\t 00-{TRACE}-{SPAN}-01 ", "01"),
        (f"01-{TRACE}-{SPAN}-01", "01"),  # a version to come begins like this one
        (f"fe-{TRACE}-{SPAN}-ff-and.more", "01"),
        (f"cc-{TRACE}-{SPAN}-fe", "00"),
    ],
)
def test_what_names_a_span_is_understood(header: str, read: str) -> None:
    assert traceparent_in(header.encode()) == f"00-{TRACE}-{SPAN}-{read}"
    assert carrier_of(header, None).traceparent == f"00-{TRACE}-{SPAN}-{read}"
    short = f"00-{'0' * 16}{SPAN}-{SPAN}-01"  # a trace id of 64 bits, as some tools have it
    assert traceparent_in(short.encode()) == short


def test_what_is_asked_for_in_a_job_belongs_to_the_jobs_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACEPARENT", f"00-{TRACE}-{SPAN}-01")
    monkeypatch.setenv("BAGGAGE", "team=core,lepton.run=other")
    monkeypatch.setenv("TRACESTATE", "vendor=1")
    here = Carrier("", str(tmp_path), "lepton.run=r")
    with telemetry.span("lepton.train", here) as run:
        pass
    with telemetry.span("lepton.promote", run.carrier):
        pass
    monkeypatch.setenv("TRACEPARENT", "rubbish")
    with telemetry.span("lepton.tune", here) as alone:
        pass

    found = {s.name: s for s in telemetry.spans_of(str(tmp_path))}
    assert (found["lepton.train"].trace_id, found["lepton.train"].parent_id) == (TRACE, SPAN)
    assert found["lepton.promote"].parent_id == found["lepton.train"].span_id
    assert entries_of(run.carrier.baggage) == {"team": "core", "lepton.run": "r"}
    assert run.carrier.headers["tracestate"] == "vendor=1"
    assert alone.carrier.trace_id != TRACE
    assert alone.carrier.tracestate == ""


def test_somebody_elses_tracing_goes_on_beside_it(tmp_path: Path) -> None:
    sent = InMemorySpanExporter()
    theirs = TracerProvider()
    theirs.add_span_processor(SimpleSpanProcessor(sent))
    before = trace.get_tracer_provider()
    tracer = theirs.get_tracer("theirs")
    with (
        tracer.start_as_current_span("outer") as outer,
        telemetry.span("lepton.train", Carrier("", str(tmp_path))),
    ):
        assert trace.get_current_span() is outer
        with tracer.start_as_current_span("inner"):
            telemetry.record("lepton.read", Carrier("", str(tmp_path)), 1, 2)

    inner, outer = sent.get_finished_spans()
    assert inner.parent == outer.context
    assert trace.get_tracer_provider() is before
    kept = telemetry.spans_of(str(tmp_path))
    assert {s.name for s in kept} == {"lepton.train", "lepton.read"}
    assert not [s for s in kept if s.parent_id]


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
