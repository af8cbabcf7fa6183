"""Evaluation in the run over several workers, which are killed meanwhile. No Ray."""

import json
import os
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import lepton
from lepton import EarlyStopping, Validation
from lepton.lake import Snapshot
from lepton.training.plan import Plan
from tests.cluster.crew import Crew, plan_of, run_of, write_rows

EVERY = 10


def loop(worker: Any, rate: float = 0.01) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    net = net.double()
    worker.attach(net=net, opt=torch.optim.Adam(net.parameters(), lr=rate))
    for batch in worker.batches():
        scores = net(batch["x"])
        worker.step(functional.cross_entropy(scores, batch["y"], reduction="sum"))


def waits(nets: Any, batch: Any, gate: Path | None = None) -> Any:
    """Judge; at the gated step say so and wait until the gate's file is there."""
    step = int(nets["count"].steps)
    if gate is not None and step == 2 * EVERY:
        (gate.parent / f"{gate.name}-{os.getpid()}").touch()
        while not gate.exists():
            time.sleep(0.01)
    return nets["net"](batch["x"])


class Count:
    """Knows the steps made, on a newcomer, too."""

    steps = 0

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


def counting_loop(worker: Any) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    net, count = net.double(), Count()
    worker.attach(net=net, opt=torch.optim.Adam(net.parameters(), lr=0.01), count=count)
    for batch in worker.batches():
        scores = net(batch["x"])
        worker.step(functional.cross_entropy(scores, batch["y"], reduction="sum"))
        count.steps += 1


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return write_rows(tmp_path_factory.mktemp("lake") / "t", 2000, dtype="float64")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return write_rows(tmp_path_factory.mktemp("lake") / "v", 1001, seed=1, dtype="float64")


def stream_of(table: Snapshot, epochs: int = 1) -> Any:
    return table.stream(batch_size=40, epochs=epochs, lanes=6, engine="worker")


def plan_with(judge: Validation, folder: Path, stream: Any, stop: Any = None) -> Plan:
    return replace(
        plan_of(folder, stream, stop), steps=stream.steps, validation=judge.settled(stream)
    )


FIGURES = ["step", "rows", "accuracy", "precision", "recall", "f1", "confusion"]


@pytest.mark.parametrize("victim", [0, 2])
def test_a_worker_killed_while_it_judges_costs_no_step_and_no_count(
    table: Snapshot, held_out: Snapshot, tmp_path: Path, victim: int
) -> None:
    stream = stream_of(table)
    judge = Validation(held_out, label="y", every=EVERY, batch_size=200)
    whole = lepton.train(loop, stream, name="whole", home=str(tmp_path), validate=judge)
    gate = tmp_path / "gate"
    gated = replace(judge, predict=partial(waits, gate=gate))
    plan = plan_with(gated, tmp_path / "r", stream)
    crew = Crew(counting_loop, stream, plan, most=3, first=3)
    crew.wait_for(lambda _: len(list(tmp_path.glob("gate-*"))) == 3)  # all of them judge
    crew.add()  # and one waits to take part
    crew.wait_for(lambda s: len(s["waiting"]) == 1)
    os.kill(crew.pid_of_rank(victim), signal.SIGKILL)
    gate.touch()
    status = crew.join()

    assert not status["error"]
    run = run_of(Path(plan.folder))
    assert run.consumption(stream).exact
    assert run.replayed == 0
    assert [a.world_size for a, _ in run.attempts] == [3, 3]
    assert run.losses == pytest.approx(whole.losses, rel=1e-6)
    assert run.evaluations().select(FIGURES) == whole.evaluations().select(FIGURES)
    assert run.evaluations()["step"].to_pylist() == [10, 20, 30, 40, 50]
    lines = (Path(plan.folder) / "evaluations.jsonl").read_text().splitlines()
    assert len(lines) == 5  # nothing counted twice


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_all_ranks_stop_at_the_same_step_with_the_best_kept(
    table: Snapshot, held_out: Snapshot, tmp_path: Path, workers: int
) -> None:
    stream = stream_of(table, epochs=20)
    judge = Validation(held_out, label="y", every=3)
    stop = EarlyStopping("accuracy", patience=2)
    quick = partial(loop, rate=0.1)
    options: dict[str, Any] = {"home": str(tmp_path), "validate": judge, "stop": stop}
    whole = lepton.train(quick, stream, name="whole", **options)
    plan = replace(plan_with(judge, tmp_path / "r", stream, stop), keep=1)
    crew = Crew(quick, stream, plan, most=workers, first=workers)
    status = crew.join()

    assert not status["error"]
    assert status["finished"]
    run = run_of(Path(plan.folder))
    done = json.loads((Path(plan.folder) / "done.json").read_text())
    assert run.steps == whole.steps < stream.steps
    assert run.best.step == done["stopped"]["best_step"] == whole.best.step
    assert [c.step for c in run.checkpoints][-1] == run.steps
    assert run.evaluations().select(FIGURES) == whole.evaluations().select(FIGURES)


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_on_ray_stops_early_and_is_returned_as_it_is(
    table: Snapshot, held_out: Snapshot, tmp_path: Path
) -> None:
    stream = stream_of(table, epochs=20)
    options: dict[str, Any] = {
        "home": str(tmp_path),
        "validate": Validation(held_out, label="y", every=3),
        "stop": EarlyStopping("accuracy", patience=2),
        "tensorboard": True,
    }
    quick = partial(loop, rate=0.1)
    here = lepton.train(quick, stream, name="here", **options)
    run = lepton.train(quick, stream, name="there", workers=2, **options)

    assert [a.world_size for a, _ in run.attempts] == [2]
    assert run.evaluations().select(FIGURES) == here.evaluations().select(FIGURES)
    assert run.steps == here.steps < stream.steps
    assert run.best.step == here.best.step
    assert len(list(Path(run.folder, "tensorboard").glob("events.*"))) == 1
    again = lepton.train(never, stream, name="there", workers=2, **options)
    assert again.steps == run.steps


def never(_: Any) -> None:
    raise AssertionError("a finished run must not train")
