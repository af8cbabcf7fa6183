"""Telemetry of the whole loop, a worker and a replica killed: one trace, exact figures, logs."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lepton.telemetry import losses_of, spans_of
from lepton.telemetry.conventions import strays
from tests.cluster.telemetry_driver import ASKED, SCRAPED, UNSAMPLED
from tests.unit.collector import Collector, attributes_of

OF_TRAINING = (
    "lepton.open",
    "lepton.plan",
    "lepton.read",
    "lepton.steps",
    "lepton.train.epoch",
    "lepton.train.failure",
    "lepton.checkpoint",
)


@dataclass
class Told:
    """What the collector, the files and the driver say of one loop."""

    home: Path
    collector: Collector
    run: dict[str, Any]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    home = tmp_path_factory.mktemp("telemetry")
    collector = Collector()
    environment = collector.environment(OTEL_METRICS_EXPORTER="otlp,prometheus")
    environment.pop("RAY_ADDRESS", None)
    driver = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("telemetry_driver.py")), str(home)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = driver.communicate(timeout=540)
        assert driver.returncode == 0, err[-3000:]
        yield Told(home, collector, json.loads(out.splitlines()[-1]))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
        driver.wait(30)
        collector.close()


def test_one_trace_without_orphans_that_keeps_to_the_conventions(told: Told) -> None:
    kept = spans_of(str(told.home / "traces"))
    ids = {s.span_id for s in kept}
    sent = {s.span_id.hex(): s for s in told.collector.spans()}

    assert {s.trace_id for s in kept} == {told.run["trace_id"]}
    assert [s.name for s in kept if s.parent_id not in ids] == ["lepton.demo"]
    assert [k for s in kept for k in strays(s.name, s.attributes)] == []
    assert [k for s in sent.values() for k in strays(s.name, attributes_of(s))] == []
    assert set(sent) <= ids
    lost = [s for s in kept if s.span_id not in sent]
    # the killed worker's and the killed replica's last 200 ms
    assert {s.name for s in lost} <= {
        "lepton.read",
        "lepton.steps",
        "lepton.slow_step",
        "lepton.request",
    }


def test_every_span_is_where_it_belongs(told: Told) -> None:
    kept = spans_of(str(told.home / "traces"))
    ids = {s.span_id: s for s in kept}
    parents = {(s.name, ids[s.parent_id].name if s.parent_id else "") for s in kept}
    assert parents - {("lepton.slow_step", "lepton.train")} == {  # if this machine stood still
        ("lepton.demo", ""),
        ("lepton.train", "lepton.demo"),
        *((name, "lepton.train") for name in OF_TRAINING),
        *((f"lepton.checkpoint.{x}", "lepton.checkpoint") for x in ("snapshot", "write", "commit")),
        *(
            (f"lepton.recovery.{x}", "lepton.train.failure")
            for x in ("detect", "meet", "state", "step")
        ),
        *((name, "lepton.demo") for name in ("lepton.evaluate", "lepton.register")),
        ("lepton.promote", "lepton.demo"),
        ("lepton.gate", "lepton.promote"),
        ("lepton.model.load", "lepton.promote"),
        ("lepton.request", "lepton.demo"),
    }


def test_links_join_the_versions_to_what_trained_them(told: Told) -> None:
    kept = spans_of(str(told.home / "traces"))
    last = max(
        (s for s in kept if s.name == "lepton.checkpoint"),
        key=lambda s: s.attributes["lepton.step"],
    )
    for span in kept:
        if span.name == "lepton.request":
            assert span.links == [f"{last.trace_id}:{last.span_id}"]
            named = span.attributes["lepton.checkpoint.trace"]
            assert named.split("-")[1:3] == [last.trace_id, last.span_id]
            assert span.attributes["lepton.version"] == told.run["version"]


def test_every_span_is_counted_though_processes_were_killed(told: Told) -> None:
    folder = str(told.home / "traces")
    kept = spans_of(folder)
    lost = {k.process: k.lost for k in losses_of(folder) if k.lost}
    counts = Counter(s.name for s in kept)
    killed, *others = dict.fromkeys(told.run["replicas"])
    replicas = {n: process for process in {s.process for s in kept} for n in [_pid(process)]}

    assert len(others) == 1
    assert counts["lepton.train.failure"] == counts["lepton.train"] == counts["lepton.gate"] == 1
    assert counts["lepton.model.load"] == 2  # by the killed replica and by the next
    assert counts["lepton.checkpoint"] == told.run["steps"] // 50
    asked = Counter(_pid(s.process) for s in kept if s.name == "lepton.request")
    assert asked[others[0]] == ASKED  # and none for the unsampled ones
    assert asked[killed] + lost.get(replicas[killed], 0) == ASKED
    ours = {process for process in lost if _pid(process) != killed}
    assert all(lost[process] == 1 for process in ours)  # the killed worker's window, at the most
    assert len(ours) <= 1


def _pid(process: str) -> int:
    return int(process.rpartition("(")[2].rstrip(")"))


def test_every_step_is_in_a_window(told: Told) -> None:
    windows = [
        s.attributes for s in spans_of(str(told.home / "traces")) if s.name == "lepton.steps"
    ]
    first = [w for w in windows if w["lepton.rank"] == 0]

    assert sum(w["lepton.steps"] for w in first) == told.run["steps"] == 400
    assert max(w["lepton.step"] for w in first) == 400
    assert 2 in {w["lepton.world_size"] for w in first}


def test_metrics_add_up_to_the_runs_own_log(told: Told) -> None:
    newest: dict[str, float] = Counter()
    for m in told.collector.metrics().values():
        for point in m.sum.data_points if m.HasField("sum") else m.histogram.data_points:
            newest[m.name] += point.count if m.HasField("histogram") else point.as_int

    assert newest["lepton.train.steps"] == told.run["steps"]
    assert newest["lepton.train.failures"] == 1
    # the killed replica's went with it
    assert newest["http.server.request.duration"] == ASKED + UNSAMPLED
    assert 0 < newest["lepton.train.rows"] < told.run["rows"]  # the killed worker's went with it
    examples = {
        e.trace_id.hex()
        for m in told.collector.collections()
        if m.name == "http.server.request.duration"
        for point in m.histogram.data_points
        for e in point.exemplars
    }
    assert examples == {told.run["trace_id"]}


def test_prometheus_scrapes_them_with_rays_labels(told: Told) -> None:
    lines = told.run["scraped"]

    for name in SCRAPED:
        found = [line for line in lines if f"ray_{name}" in line]
        assert found, name
        assert all("WorkerId=" in line and "SessionName=" in line for line in found)


def test_logs_belong_to_the_run(told: Told) -> None:
    (said,) = [r for r in told.collector.logs() if "a worker was lost" in r.body.string_value]
    (kept,) = [
        entry
        for path in (told.home / "runs" / "r" / "logs").glob("rank-*.jsonl")
        for entry in map(json.loads, path.read_text().splitlines())
        if "a worker was lost" in entry["message"]
    ]

    assert attributes_of(said) == {"lepton.run": "r", "lepton.rank": 0}
    assert said.trace_id.hex() == kept["trace_id"] == told.run["trace_id"]
    assert kept["lepton.rank"] == 0
