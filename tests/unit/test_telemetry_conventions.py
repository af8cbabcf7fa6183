"""Names of spans and attributes: a frozen table, and what is really recorded keeps to it."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

import lepton
from lepton import telemetry
from lepton.registry import Registry
from lepton.serving.protocol import request_of
from lepton.serving.replica import Replica
from lepton.telemetry import Few, metrics
from lepton.telemetry.baggage import entries_of
from lepton.telemetry.conventions import ATTRIBUTES, ON_ALL, SPANS, strays
from lepton.telemetry.reference import page
from lepton.telemetry.rounds import rounds
from lepton.training.run import load_run

NAMES = """
lepton.abort lepton.batch lepton.canary lepton.checkpoint lepton.checkpoint.commit
lepton.checkpoint.snapshot lepton.checkpoint.write lepton.checkpoint_table
lepton.cross_validate lepton.demo lepton.evaluate lepton.gate
lepton.model.load lepton.model.run lepton.open lepton.optimize lepton.pause lepton.plan
lepton.promote lepton.read
lepton.recovery.detect lepton.recovery.meet lepton.recovery.state lepton.recovery.step
lepton.register
lepton.request lepton.restore lepton.rollback lepton.score lepton.slow_step lepton.steps
lepton.table lepton.train
lepton.train.epoch lepton.train.failure lepton.train.resize lepton.train.straggler lepton.tune
lepton.use lepton.vacuum
"""
KINDS = {"str": str, "int": int, "float": float | int, "bool": bool, "str[]": list}
UNSAMPLED = f"00-{'ab' * 16}-{'cd' * 8}-00"
SAMPLED = f"00-{'12' * 16}-{'34' * 8}-01"


def test_the_names_are_these() -> None:
    assert sorted(SPANS) == NAMES.split()
    used = {a for s in SPANS.values() for a in s.attributes}
    assert used | {*ON_ALL} == set(ATTRIBUTES)
    assert strays("lepton.request", ON_ALL) == [f"lepton.request: {a}" for a in ON_ALL[1:]]
    assert strays("lepton.gate", ["error.type", "lepton.model", "lepton.rows"]) == [
        "lepton.gate: lepton.rows"
    ]
    assert strays("lepton.nothing", []) == ["lepton.nothing"]


def test_the_page_of_names_and_units_is_the_tables() -> None:
    written = Path(__file__).parents[2] / "docs" / "telemetry.md"

    assert page() == written.read_text(), "python -m lepton.telemetry.reference > docs/telemetry.md"
    assert {a.kind for a in ATTRIBUTES.values()} <= {*KINDS}
    wordy = [n for n in ATTRIBUTES if n.endswith(("_s", ".p50", ".p99", ".max"))]
    assert {ATTRIBUTES[n].unit for n in wordy} == {"s"}


class Loop:
    """A model trained, registered and served in this process."""

    def __init__(self, home: Path) -> None:
        self.home = home
        x = np.random.default_rng(0).normal(size=(120, 3)).astype("float32")
        rows = pa.table({"x": list(x), "y": x.argmax(1).astype("int64")})
        self.table = lepton.write(rows, home / "lake" / "t")
        stream = self.table.stream(batch_size=20, lanes=1)
        with pytest.raises(OSError, match="power"):
            lepton.train(train(fail_at=4), stream, name="r", home=home, checkpoint_every=2)
        run = lepton.train(train(), stream, name="r", home=home, checkpoint_every=2)
        judged = lepton.evaluate(run, self.table, label="y", home=home)
        lepton.register(run, "m", metrics=judged.metrics, home=home)
        registry = Registry(home / "registry")
        registry.promote("m", 1, expect=registry.state("m").pointer.seq, gate=[], trace_id="")
        self.replica = Replica("m", str(home))
        self.app = self.replica.__serve_build_asgi_app__()

    def ask(self, traceparent: str, body: bytes | None = None) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://m") as client:
                content = self.question() if body is None else body
                headers = {"traceparent": traceparent}
                return await client.post("/v2/models/m/infer", content=content, headers=headers)

        return asyncio.run(ask())

    def question(self) -> bytes:
        shape = [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
        return request_of(self.table.select(["x"]).head(2), shape)

    def spans(self, trace_id: str | None = None) -> list[telemetry.SpanRecord]:
        self.replica._spans.flush()
        return telemetry.spans_of(str(self.home / "traces"), trace_id)


def train(*, fail_at: int | None = None, look: Any = None) -> Any:
    def loop(worker: Any) -> None:
        net = torch.nn.Linear(3, 3)
        worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
        for batch in worker.batches():
            if worker.step_number == fail_at:
                raise OSError("the power went out")
            worker.step(functional.cross_entropy(net(batch["x"]), batch["y"], reduction="sum"))
            if look is not None:
                worker._saver.wait()
                look()

    return loop


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    found = Loop(tmp_path_factory.mktemp("home"))
    yield found
    found.replica.__del__()  # as Ray Serve ends it


def test_what_is_recorded_is_in_the_table(made: Loop) -> None:
    made.ask(SAMPLED)
    spans = made.spans()

    assert [s for span in spans for s in strays(span.name, span.attributes)] == []
    for name, value in ((n, v) for s in spans for n, v in s.attributes.items()):
        assert isinstance(value, KINDS[ATTRIBUTES[name].kind]), name
    sometimes = {"lepton.batch", "lepton.model.run"}
    assert {s.name for s in spans} - sometimes == {
        "lepton.train",
        "lepton.open",
        "lepton.plan",
        "lepton.read",
        "lepton.train.epoch",
        "lepton.steps",
        "lepton.checkpoint",
        "lepton.checkpoint.snapshot",
        "lepton.checkpoint.write",
        "lepton.checkpoint.commit",
        "lepton.evaluate",
        "lepton.register",
        "lepton.model.load",
        "lepton.request",
    }
    failed = [s for s in spans if s.status == "error"]
    assert [(s.name, s.attributes["error.type"]) for s in failed] == [("lepton.train", "OSError")]


def test_every_read_is_told_of(made: Loop) -> None:
    reads = [s.attributes for s in made.spans() if s.name == "lepton.read"]

    assert sum(r["lepton.reads"] for r in reads) == len(reads) > 0


@given(st.lists(st.floats(0, 3), max_size=300))
def test_few_of_many_stand_for_all(pauses: list[float]) -> None:
    few = Few(at_once=5, a_second=2)
    times = [1000 + sum(pauses[: n + 1]) for n in range(len(pauses))]
    taken = [few.take(at) for at in times]

    kept = [n for n, reads in enumerate(taken) if reads]
    assert sum(taken) == (kept[-1] + 1 if kept else 0)  # but for the last ones left out
    assert taken[:5] == [1] * len(taken[:5])
    for first, at in enumerate(times):
        within = [n for n in kept if n >= first and times[n] <= at + 10]
        assert len(within) <= 5 + 2 * 10 + 1


def test_windows_of_steps_tell_of_every_step_and_row(made: Loop) -> None:
    windows = [s for s in made.spans() if s.name == "lepton.steps"]

    assert sum(w.attributes["lepton.steps"] for w in windows) == 4 + 2  # made, then resumed
    assert sum(w.attributes["lepton.rows"] for w in windows) == 120
    runs = {s.span_id for s in made.spans() if s.name == "lepton.train"}
    assert {w.parent_id for w in windows} == runs


def test_what_judges_and_registers_is_linked_to_what_trained(made: Loop, tmp_path: Path) -> None:
    run = load_run("r", str(made.home))
    here = telemetry.Carrier(SAMPLED, str(tmp_path))
    lepton.evaluate(run, made.table, label="y", home=str(tmp_path), trace=here)
    lepton.register(run, "m", home=tmp_path, trace=here)
    far = telemetry.spans_of(str(tmp_path))

    written = ":".join(run.checkpoint.traceparent.split("-")[1:3])
    assert {s.name: s.links for s in far} == {
        "lepton.evaluate": [written],
        "lepton.register": [written],
    }
    (near,) = [s for s in made.spans() if s.name == "lepton.evaluate"]
    assert (near.links, near.parent_id) == ([], written[33:])  # it is below that span


def test_an_answer_says_where_it_came_from(made: Loop) -> None:
    reply = made.ask(SAMPLED)

    assert reply.headers["traceparent"].split("-")[1] == "12" * 16
    assert entries_of(reply.headers["baggage"]) == {
        "lepton.model": "m",
        "lepton.version": "1",
        "lepton.run": "r",
        "lepton.table": f"t@{made.table.version}",
    }


def test_an_unsampled_request_records_nothing_but_a_servers_failure(
    made: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert made.ask(UNSAMPLED).status_code == 200
    assert made.ask(UNSAMPLED, b"rubbish").status_code == 400
    assert made.spans("ab" * 16) == []

    resident = made.replica._follower.now.champion
    monkeypatch.setattr(type(resident.predictor), "__call__", _break)
    assert made.ask(UNSAMPLED).status_code == 500
    (failed,) = made.spans("ab" * 16)
    assert failed.name == "lepton.request"
    assert failed.attributes["error.type"] == "RuntimeError"
    assert "secret" not in str(failed)


def _break(*_: Any) -> None:
    raise RuntimeError("a secret")


def test_the_age_of_a_checkpoint_is_told_while_the_run_goes_on(
    made: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "prometheus")
    told: list[tuple[str, float]] = []
    monkeypatch.setattr(metrics._state, "sinks", [Kept(told)])
    stream = made.table.stream(batch_size=20, lanes=1)
    lepton.train(train(look=rounds.make), stream, name="r", home=tmp_path, checkpoint_every=1)
    ages = [value for name, value in told if name == "lepton.checkpoint.age"]
    before = len(ages)
    rounds.make()

    assert ages
    assert min(ages) >= 0
    assert len([n for n, _ in told if n == "lepton.checkpoint.age"]) == before
    assert sum(value for name, value in told if name == "lepton.train.rows") == 120


class Kept:
    """Keeps what is measured."""

    def __init__(self, told: list[tuple[str, float]]) -> None:
        self._told = told

    def take(self, what: Any, value: float, labels: Any, trace: str) -> None:
        self._told.append((what.name, value))

    def take_all(self, what: Any, values: Any, labels: Any, trace_of: Any) -> None:
        self._told.extend((what.name, value) for value in values)
