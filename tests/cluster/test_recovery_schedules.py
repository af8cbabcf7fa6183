"""Schedules of kills and resizes, drawn from a seed: the model is that of an undisturbed run.

Losses agree to 1e-6 (relative) and weights to 1e-9; with ``exact=True`` weights agree to the last
bit. The workers wait at certain steps until the schedule lets them go on, so that each
fault meets a run that goes on; where in a step it strikes is left to chance.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import lepton
from lepton import checkpoints
from lepton.lake import Snapshot
from lepton.training.run import Run
from tests.cluster.crew import Crew, plan_of, run_of, write_rows

ROWS, BATCH, EPOCHS, MOST = 1600, 40, 2, 4
STEPS = ROWS // BATCH * EPOCHS
NO_STEP_LOST = ("kill", "kill two", "kill again", "join", "leave")
"""``kill again``: another one, as soon as the loss of the first is known."""


class Gate:
    """How many steps may be made by now; a file, as the workers are other processes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, steps: int) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(str(steps))
        temporary.replace(self.path)

    def wait(self, made: int) -> None:
        while made >= int(self.path.read_text()):
            time.sleep(0.005)


def loop(worker: Any, gate: Gate | None = None) -> None:
    """With what keeps a state of its own: moments, a schedule, statistics that are frozen."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 16), torch.nn.BatchNorm1d(16, momentum=0.0), torch.nn.Linear(16, 3)
    ).double()
    net[1].eval()
    opt = torch.optim.Adam(net.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(opt, step_size=20, gamma=0.7)
    worker.attach(net=net, opt=opt, schedule=schedule)
    for batch in worker.batches():
        if gate:
            gate.wait(worker.step_number)
        loss = functional.cross_entropy(net(batch["x"].double()), batch["y"], reduction="sum")
        worker.step(loss)
        schedule.step()


def exact_loop(worker: Any, gate: Gate | None = None) -> None:
    """In single precision, with dropout: nothing but the order of sums keeps this equal."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 16), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(16, 3)
    )
    worker.attach(net=net, opt=torch.optim.Adam(net.parameters(), lr=0.01))
    for _ in worker.batches():
        if gate:
            gate.wait(worker.step_number)
        worker.step(
            lambda rows: functional.cross_entropy(net(rows["x"]), rows["y"], reduction="sum")
        )


LOOPS: dict[bool, Callable[..., None]] = {False: loop, True: exact_loop}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return write_rows(tmp_path_factory.mktemp("lake") / "t", ROWS)


def stream_of(table: Snapshot) -> Any:
    return table.stream(batch_size=BATCH, epochs=EPOCHS, lanes=12, engine="worker")


@pytest.fixture(scope="module")
def undisturbed(table: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Run]:
    """One worker, in this process, without and with ``exact``."""
    home, threads = str(tmp_path_factory.mktemp("home")), torch.get_num_threads()
    options: dict[str, Any] = {"home": home, "progress": False}
    try:
        return {
            exact: lepton.train(
                LOOPS[exact], stream_of(table), name=f"{exact}", exact=exact, **options
            )
            for exact in (False, True)
        }
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)


def drawn(seed: int, chance: random.Random) -> list[tuple[int, str]]:
    """Return a schedule: each kind of fault once, at any step; by odd seeds all are lost, too."""
    kinds = [*NO_STEP_LOST, *(["kill all"] if seed % 2 else [])]
    chance.shuffle(kinds)
    steps = sorted(chance.sample(range(4, STEPS - 12, 8), len(kinds)))
    return list(zip(steps, kinds, strict=True))


NEEDS = {"kill": 2, "kill two": 3, "kill again": 3, "leave": 2}
"""Workers before a fault, so that one is left to carry the state on."""


class Trouble:
    """Does to a crew what a schedule says."""

    def __init__(self, crew: Crew, gate: Gate, chance: random.Random) -> None:
        self._crew, self._gate, self._chance = crew, gate, chance
        self._nodes = self._allowed = 0

    def add(self, count: int) -> None:
        """Start workers, each on a node of its own."""
        for _ in range(count):
            self._nodes += 1
            self._crew.add(f"n{self._nodes:05d}")

    def go_to(self, step: int) -> None:
        """Let the run make so many steps, and wait until it has."""
        self._allow(step)
        self._crew.wait_for(lambda s: max(s["members"].values(), default=0) >= self._allowed)

    def strike(self, kind: str, then: int) -> None:
        """Do it to a run that stands before a step; let it go on to another."""
        size = NEEDS.get(kind, 1)
        self.add(max(0, size - len(self._crew.status()["pids"])))
        self._crew.wait_for(lambda s: len(s["members"]) + len(s["waiting"]) >= size)
        began = self._allowed
        self._step_until(
            lambda s: len(s["members"]) >= size and min(s["members"].values()) >= began
        )
        if kind == "join":
            self.add(1)
            self._crew.wait_for(lambda s: s["waiting"] or len(s["members"]) == MOST)
        elif kind == "leave":
            leaver = self._chance.choice(sorted(self._crew.status()["members"]))
            self._crew.release(leaver.partition("-")[0])
            self._step_until(lambda s: leaver not in s["members"])
        else:
            self._kill(kind, then)
        self._allow(then)

    def _kill(self, kind: str, then: int) -> None:
        if self._chance.random() < 0.7:  # while they train; else while all wait
            self._allow(then)
            time.sleep(self._chance.random() / 50)
        status = self._crew.status()
        members = sorted(status["members"])
        count = {"kill two": 2, "kill all": len(members)}.get(kind, 1)
        victims = self._chance.sample(members, count)
        for victim in victims:
            os.kill(status["pids"][victim], signal.SIGKILL)
        self._crew.wait_for(lambda s: not set(victims) & set(s["pids"]))
        if kind == "kill again":
            status = self._crew.status()
            victim = self._chance.choice(sorted(status["members"]))
            os.kill(status["pids"][victim], signal.SIGKILL)
            self._crew.wait_for(lambda s: victim not in s["pids"])
        if kind == "kill all":
            self.add(2)

    def _allow(self, step: int) -> None:
        self._allowed = max(self._allowed, step)
        self._gate.open(self._allowed)

    def _step_until(self, condition: Callable[[dict[str, Any]], bool]) -> None:
        """Let the run go on one step at a time: workers change at the boundary between two."""

        def made(status: dict[str, Any]) -> bool:
            return condition(status) or min(status["members"].values(), default=0) >= self._allowed

        while not condition(self._crew.status()):
            self._allow(self._allowed + 1)
            self._crew.wait_for(made)


@pytest.mark.parametrize(("seed", "exact"), [(0, False), (1, True), (2, True)])
def test_any_schedule_of_kills_and_resizes_ends_with_the_same_model(
    table: Snapshot, undisturbed: dict[bool, Run], tmp_path: Path, seed: int, exact: bool
) -> None:
    chance = random.Random(seed)
    gate = Gate(tmp_path / "gate")
    gate.open(0)
    stream = stream_of(table)
    plan = plan_of(tmp_path / "r", stream, lanes=12, exact=exact)
    crew = Crew(partial(LOOPS[exact], gate=gate), stream, plan, most=MOST, first=0)
    trouble = Trouble(crew, gate, chance)
    trouble.add(chance.randint(1, MOST))
    schedule = drawn(seed, chance)
    for (at, kind), (then, _) in zip(schedule, [*schedule[1:], (STEPS, "")], strict=True):
        trouble.go_to(at)
        trouble.strike(kind, then)
    status = crew.join()

    assert not status["error"], schedule
    run, whole = run_of(tmp_path / "r"), undisturbed[exact]
    assert run.steps == whole.steps == STEPS
    assert run.consumption(stream).exact, schedule
    assert run.losses == pytest.approx(whole.losses, rel=1e-6)
    assert run.replayed == 0 or "kill all" in dict(schedule).values()
    sizes = {a.world_size for a, _ in run.attempts}
    assert len(sizes) > 1, schedule
    weights = checkpoints.restore(run.checkpoint)["net"]
    for name, value in checkpoints.restore(whole.checkpoint)["net"].items():
        if exact:
            assert torch.equal(weights[name], value), (name, schedule)
        else:
            assert torch.allclose(weights[name], value, rtol=1e-9, atol=1e-12), (name, schedule)
