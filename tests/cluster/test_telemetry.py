"""Telemetry of the whole loop, a worker and a replica killed: one trace, exact figures, logs."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lepton.telemetry import SpanRecord, losses_of, spans_of
from lepton.telemetry.conventions import strays
from tests.cluster.telemetry_driver import ASKED, SCRAPED
from tests.unit.collector import Collector, attributes_of

OF_TRAINING = (
    "lepton.train.resize",
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
    environment = collector.environment(
        OTEL_METRICS_EXPORTER="otlp,prometheus",
        OTEL_METRIC_EXPORT_INTERVAL="3600000",  # what is there was sent when a process ended
    )
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
    recovered = {f"lepton.recovery.{x}" for x in ("meet", "state", "step")}
    sometimes = {
        ("lepton.slow_step", "lepton.train"),  # if this machine stood still
        ("lepton.batch", "lepton.request"),
        ("lepton.model.run", "lepton.batch"),
    }
    assert parents - sometimes == {
        ("lepton.demo", ""),
        ("lepton.train", "lepton.demo"),
        *((name, "lepton.train") for name in OF_TRAINING),
        *((f"lepton.checkpoint.{x}", "lepton.checkpoint") for x in ("snapshot", "write", "commit")),
        ("lepton.recovery.detect", "lepton.train.failure"),
        *((x, f"lepton.train.{y}") for x in recovered for y in ("failure", "resize")),
        *((name, "lepton.demo") for name in ("lepton.evaluate", "lepton.register")),
        ("lepton.promote", "lepton.demo"),
        ("lepton.gate", "lepton.promote"),
        ("lepton.canary", "lepton.promote"),
        ("lepton.rollback", "lepton.demo"),
        ("lepton.model.load", "lepton.promote"),
        ("lepton.request", "lepton.demo"),
    }


def _below(kept: Sequence[SpanRecord], name: str, **wanted: Any) -> list[SpanRecord]:
    """Return the spans below the one of that name that has these attributes, by start."""
    about = {f"lepton.{key}": value for key, value in wanted.items()}
    (above,) = [s for s in kept if s.name == name and about.items() <= s.attributes.items()]
    return [s for s in kept if s.parent_id == above.span_id]


def _named(kept: Sequence[SpanRecord], name: str) -> list[SpanRecord]:
    return [s for s in kept if s.name == name]


def test_links_join_the_versions_to_what_trained_and_deployed_them(told: Told) -> None:
    kept = spans_of(str(told.home / "traces"))
    first, second = (
        _named(_below(kept, "lepton.train", run=run), "lepton.checkpoint")[-1]
        for run in ("r", "r2")
    )
    written = {told.run["version"]: _id(first), told.run["better"]: _id(second)}
    promoted = {s.attributes["lepton.version"]: _id(s) for s in _named(kept, "lepton.promote")}
    for span in kept:
        number = span.attributes.get("lepton.version")
        if span.name == "lepton.request":
            assert number == told.run["version"]
            assert span.links == [written[number], promoted[number]]
            named = span.attributes["lepton.checkpoint.trace"]
            assert ":".join(named.split("-")[1:3]) == written[number]
        links = ("register", "promote", "canary", "model.load", "rollback")
        if span.name in {f"lepton.{name}" for name in links}:
            assert span.links == [written[number]], span


def _id(span: SpanRecord) -> str:
    return f"{span.trace_id}:{span.span_id}"


def test_each_promotion_has_the_loads_that_it_asked_for(told: Told) -> None:
    kept = spans_of(str(told.home / "traces"))
    loads = [
        [s.attributes["lepton.version"] for s in _named(below, "lepton.model.load")]
        for below in (
            _below(kept, "lepton.promote", version=told.run[v]) for v in ("version", "better")
        )
    ]

    first, second = told.run["version"], told.run["better"]
    assert loads == [[first, first], [second]]  # the killed replica, and the one in its place
    (back,) = _named(kept, "lepton.rollback")
    assert back.attributes == {"lepton.model": "m", "lepton.version": second}
    (canary,) = _named(kept, "lepton.canary")
    assert canary.attributes["lepton.share"] == 0.5


def test_a_replacement_tells_of_itself_in_the_same_run(told: Told) -> None:
    below = _below(spans_of(str(told.home / "traces")), "lepton.train", run="r")
    (failure,) = _named(below, "lepton.train.failure")
    before = {s.process for s in below if s.start_ns < failure.start_ns}
    after = {s.process for s in _named(below, "lepton.steps")} - before

    assert len(after) == 1, "the worker that came in the place of the killed one"
    resizes = _named(below, "lepton.train.resize")
    assert [s.attributes["lepton.world_size"] for s in resizes] == [2]
    (detected,) = [
        s
        for s in spans_of(str(told.home / "traces"))
        if s.name == "lepton.recovery.detect" and s.parent_id == failure.span_id
    ]
    assert failure.start_ns == detected.start_ns <= detected.end_ns <= failure.end_ns


def test_ray_datas_tasks_tell_of_every_row_that_they_read(told: Told) -> None:
    kept = spans_of(str(told.home / "traces"))
    below = _below(kept, "lepton.train", run="r2")
    reads = _named(below, "lepton.read")
    workers = {s.process for s in _named(below, "lepton.steps")}

    assert sum(s.attributes["lepton.rows"] for s in reads) == told.run["rows_by_data"]
    assert sum(s.attributes["lepton.reads"] for s in reads) == len(reads)
    assert {s.process for s in reads}.isdisjoint(workers)
    epochs = [s.attributes["lepton.epoch"] for s in _named(below, "lepton.train.epoch")]
    assert epochs == [0, 1]


def test_every_span_is_counted_though_processes_were_killed(told: Told) -> None:
    folder = str(told.home / "traces")
    kept = spans_of(folder)
    lost = {k.process: k.lost for k in losses_of(folder) if k.lost}
    counts = Counter(s.name for s in kept)
    of_r = Counter(s.name for s in _below(kept, "lepton.train", run="r"))
    killed, *others = dict.fromkeys(told.run["replicas"])
    replicas = {n: process for process in {s.process for s in kept} for n in [_pid(process)]}

    assert len(others) == 1
    for name, count in (("train", 2), ("promote", 2), ("gate", 2), ("register", 2)):
        assert counts[f"lepton.{name}"] == count, name
    assert of_r["lepton.train.failure"] == counts["lepton.train.failure"] == 1
    assert of_r["lepton.train.epoch"] == 2
    assert of_r["lepton.checkpoint"] == told.run["steps"] // 50
    asked = Counter(_pid(s.process) for s in kept if s.name == "lepton.request")
    assert asked[others[0]] == ASKED  # and none for the unsampled ones
    assert asked[killed] + lost.get(replicas[killed], 0) == ASKED
    ours = {process for process in lost if _pid(process) != killed}
    assert all(lost[process] == 1 for process in ours)  # the killed worker's window, at the most
    assert len(ours) <= 1


def _pid(process: str) -> int:
    return int(process.rpartition("(")[2].rstrip(")"))


def test_every_step_is_in_a_window(told: Told) -> None:
    below = _below(spans_of(str(told.home / "traces")), "lepton.train", run="r")
    windows = [s.attributes for s in _named(below, "lepton.steps")]
    first = [w for w in windows if w["lepton.rank"] == 0]

    assert sum(w["lepton.steps"] for w in first) == told.run["steps"] == 400
    assert max(w["lepton.step"] for w in first) == 400
    assert 2 in {w["lepton.world_size"] for w in first}


def test_metrics_add_up_to_the_runs_own_log(told: Told) -> None:
    newest: dict[str, list[float]] = defaultdict(list)
    for (_, name), m in told.collector.metrics_by_process().items():
        points = m.sum.data_points if m.HasField("sum") else m.histogram.data_points
        counts = (p.count if m.HasField("histogram") else p.as_int for p in points)
        newest[name].append(sum(counts))

    by_data = told.run["rows_by_data"]
    assert sorted(newest["lepton.train.steps"]) == [by_data // 200, told.run["steps"]]
    assert sum(newest["lepton.train.failures"]) == 1
    # the killed replica's, or some of them, went with it
    assert max(newest["http.server.request.duration"]) == told.run["asked"] - ASKED
    # and so did the killed worker's
    assert 0 < sum(newest["lepton.train.rows"]) <= told.run["rows"] + by_data
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
