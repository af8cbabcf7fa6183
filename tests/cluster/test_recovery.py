"""Workers killed, stopped, added and let go in training: no step and no row is lost. No Ray."""

import os
import signal
import threading
import time
from contextlib import suppress
from dataclasses import replace
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

ROWS, BATCH, EPOCHS = 4000, 40, 3


def loop(worker: Any, gates: dict[int, Path] | None = None) -> None:
    """Train; at a gated step wait until the gate's file is there."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 16), torch.nn.BatchNorm1d(16, momentum=0.0), torch.nn.Linear(16, 3)
    ).double()
    net[1].eval()
    opt = torch.optim.Adam(net.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(opt, step_size=40, gamma=0.7)
    worker.attach(net=net, opt=opt, schedule=schedule)
    for batch in worker.batches():
        while (gate := (gates or {}).get(worker.step_number)) and not gate.exists():
            time.sleep(0.01)
        loss = functional.cross_entropy(net(batch["x"].double()), batch["y"], reduction="sum")
        worker.step(loss)
        schedule.step()


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return write_rows(tmp_path_factory.mktemp("lake") / "t", ROWS)


def stream_of(table: Snapshot) -> Any:
    return table.stream(batch_size=BATCH, epochs=EPOCHS, lanes=12, engine="worker")


@pytest.fixture(scope="module")
def undisturbed(table: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> Run:
    home = str(tmp_path_factory.mktemp("home"))
    return lepton.train(loop, stream_of(table), name="whole", home=home, checkpoint_every=25)


def check(run: Run, whole: Run, table: Snapshot, *, replayed: int = 0) -> None:
    """Nothing lost, nothing repeated, and the same model."""
    stream = stream_of(table)
    assert run.steps == whole.steps == stream.steps
    assert run.consumption(stream).exact
    assert run.replayed <= replayed
    assert run.losses == pytest.approx(whole.losses, rel=1e-6)
    weights = checkpoints.restore(run.checkpoint)["net"]
    for name, value in checkpoints.restore(whole.checkpoint)["net"].items():
        assert torch.allclose(weights[name], value, rtol=1e-9, atol=1e-12)


def past(step: int) -> Any:
    return lambda s: max(s["members"].values(), default=0) >= step


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_killed_worker_costs_no_step(
    table: Snapshot, undisturbed: Run, tmp_path: Path, rank: int
) -> None:
    crew = Crew(loop, stream_of(table), plan_of(tmp_path / "r", stream_of(table)), most=3, first=3)
    crew.wait_for(past(30))
    os.kill(crew.pid_of_rank(rank), signal.SIGKILL)
    status = crew.join()

    assert not status["error"]
    run = run_of(tmp_path / "r")
    assert [a.world_size for a, _ in run.attempts] == [3, 2]
    check(run, undisturbed, table)


def test_newcomers_join_and_leave_at_a_boundary(
    table: Snapshot, undisturbed: Run, tmp_path: Path
) -> None:
    gates = {20: tmp_path / "a", 60: tmp_path / "b", 61: tmp_path / "b"}
    plan = plan_of(tmp_path / "r", stream_of(table))
    crew = Crew(partial(loop, gates=gates), stream_of(table), plan, most=3, first=1)
    crew.wait_for(past(20))  # it stands before the gate, so both newcomers have to wait
    crew.add()
    crew.add("going")
    crew.wait_for(lambda s: len(s["waiting"]) == 2)
    gates[20].touch()
    crew.wait_for(lambda s: len(s["members"]) == 3)
    crew.release("going")
    gates[60].touch()
    status = crew.join()

    assert not status["error"]
    run = run_of(tmp_path / "r")
    sizes = [a.world_size for a, _ in run.attempts]
    assert sizes[0] == 1
    assert 3 in sizes
    assert sizes[-1] == 2
    check(run, undisturbed, table)


def test_a_stopped_process_is_replaced_by_the_spare(
    table: Snapshot, undisturbed: Run, tmp_path: Path
) -> None:
    plan = plan_of(tmp_path / "r", stream_of(table))
    gate = tmp_path / "gate"
    gated = partial(loop, gates={20: gate})
    crew = Crew(gated, stream_of(table), plan, most=2, first=2, hang_s=1.0)
    crew.wait_for(past(20))
    crew.add()
    crew.wait_for(lambda s: len(s["waiting"]) == 1)
    os.kill(crew.pid_of_rank(1), signal.SIGSTOP)
    gate.touch()
    crew.wait_for(lambda s: any(e.kind == "hung" for e in s["events"]))
    status = crew.join()

    assert [e.kind for e in status["events"] if e.kind in ("hung", "lost")] == ["hung", "lost"]
    run = run_of(tmp_path / "r")
    assert [a.world_size for a, _ in run.attempts][-1] == 2
    check(run, undisturbed, table)


def test_all_killed_go_on_from_the_newest_checkpoint(
    table: Snapshot, undisturbed: Run, tmp_path: Path
) -> None:
    plan = plan_of(tmp_path / "r", stream_of(table))
    crew = Crew(loop, stream_of(table), plan, most=2, first=2)
    crew.wait_for(past(60))
    pids = [crew.pid_of_rank(0), crew.pid_of_rank(1)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    crew.add()
    crew.add()
    crew.join()

    run = run_of(tmp_path / "r")
    assert run.attempts[1][0].step >= 25
    check(run, undisturbed, table, replayed=300)


def die_once(marker: Path) -> None:
    """End this process, as by kill -9, if no other has come here before."""
    with suppress(FileExistsError):
        marker.touch(exist_ok=False)
        os.kill(os.getpid(), signal.SIGKILL)


class Fatal:
    """Has a state; whoever is the first to be handed it dies of it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def state_dict(self) -> dict[str, int]:
        return {"n": 1}

    def load_state_dict(self, _: Any) -> None:
        die_once(self.marker)


def dies(worker: Any, when: str, marker: Path, gate: Path) -> None:
    """The loop above; one process dies at the moment that is asked for."""
    if when == "before attach":
        die_once(marker)
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 16), torch.nn.BatchNorm1d(16, momentum=0.0), torch.nn.Linear(16, 3)
    ).double()
    net[1].eval()
    opt = torch.optim.Adam(net.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(opt, step_size=40, gamma=0.7)
    fatal = {"fatal": Fatal(marker)} if when == "in a resize" else {}
    worker.attach(net=net, opt=opt, schedule=schedule, **fatal)
    if when == "after attach":
        die_once(marker)
    for batch in worker.batches():
        while worker.step_number == 20 and not gate.exists():
            time.sleep(0.01)
        loss = functional.cross_entropy(net(batch["x"].double()), batch["y"], reduction="sum")
        worker.step(loss)
        schedule.step()


@pytest.mark.parametrize("when", ["before attach", "after attach", "in a resize"])
def test_a_worker_that_dies_while_the_workers_come_together(
    table: Snapshot, undisturbed: Run, tmp_path: Path, when: str
) -> None:
    gate = tmp_path / "gate"
    moment = partial(dies, when=when, marker=tmp_path / "dead", gate=gate)
    plan = plan_of(tmp_path / "r", stream_of(table))
    crew = Crew(moment, stream_of(table), plan, most=3, first=2)
    if when == "in a resize":
        crew.wait_for(past(20))
        crew.add()
        crew.wait_for(lambda s: len(s["waiting"]) == 1)
        gate.touch()
    crew.wait_for(lambda _: (tmp_path / "dead").exists())
    crew.add()
    gate.touch()
    status = crew.join()

    assert not status["error"]
    assert sum(p.exitcode == -signal.SIGKILL for p in crew.processes) == 1
    run = run_of(tmp_path / "r")
    assert run.consumption(stream_of(table)).exact
    assert run.losses == pytest.approx(undisturbed.losses, rel=1e-6)


def heavy(worker: Any, folder: Path) -> None:
    """The loop above with a large state; its writer dies while it writes the second checkpoint."""

    def watch() -> None:
        while not list(folder.glob("checkpoints/data/step-00000050-*/*")):
            time.sleep(0.0005)
        whole = (folder / "checkpoints/step-00000050.json").exists()
        (folder / ("late" if whole else "torn")).touch()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.manual_seed(0)
    net = torch.nn.Linear(3, 3).double()
    net.register_buffer("ballast", torch.zeros(8_000_000))
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
    for batch in worker.batches():
        if worker.step_number == 45 and worker.rank == 0 and not list(folder.glob("[lt]*")):
            threading.Thread(target=watch, daemon=True).start()
        worker.step(functional.cross_entropy(net(batch["x"].double()), batch["y"], reduction="sum"))


def test_a_writer_killed_in_mid_checkpoint_costs_no_step(table: Snapshot, tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "r", stream_of(table))
    crew = Crew(partial(heavy, folder=tmp_path / "r"), stream_of(table), plan, most=2, first=2)
    status = crew.join()

    assert not status["error"]
    run = run_of(tmp_path / "r")
    assert (tmp_path / "r/torn").exists(), "the manifest was there before the kill"
    assert run.replayed == 0
    assert run.consumption(stream_of(table)).exact
    assert [a.world_size for a, _ in run.attempts] == [2, 1]
    for manifest in run.checkpoints:
        checkpoints.verify(manifest)


def test_two_killed_at_once_cost_no_step(table: Snapshot, undisturbed: Run, tmp_path: Path) -> None:
    crew = Crew(loop, stream_of(table), plan_of(tmp_path / "r", stream_of(table)), most=3, first=3)
    crew.wait_for(past(30))
    for pid in [crew.pid_of_rank(0), crew.pid_of_rank(2)]:
        os.kill(pid, signal.SIGKILL)
    crew.add()
    status = crew.join()

    assert not status["error"]
    check(run_of(tmp_path / "r"), undisturbed, table)


def adapted(worker: Any, gate: Path) -> None:
    """Train a head on a frozen body, which is another one in each process until they meet."""
    torch.manual_seed(os.getpid())
    net = torch.nn.Sequential(torch.nn.Linear(3, 400), torch.nn.Linear(400, 3))
    net[0].requires_grad_(False)
    worker.attach(net=net, opt=torch.optim.Adam(net.parameters(), lr=0.01))
    for batch in worker.batches():
        while worker.step_number == 30 and not gate.exists():
            time.sleep(0.01)
        worker.step(functional.cross_entropy(net(batch["x"]), batch["y"], reduction="sum"))


def test_survivors_hand_on_what_is_frozen_too(table: Snapshot, tmp_path: Path) -> None:
    plan = replace(plan_of(tmp_path / "r", stream_of(table)), trainable_only=True)
    gate = tmp_path / "gate"
    crew = Crew(partial(adapted, gate=gate), stream_of(table), plan, most=2, first=2)
    crew.wait_for(lambda s: past(30)(s) and bool(checkpoints.all_of(plan.kept_in)))
    crew.add()
    crew.wait_for(lambda s: len(s["waiting"]) == 1)
    os.kill(crew.pid_of_rank(0), signal.SIGKILL)  # who alone has written so far
    gate.touch()
    status = crew.join()

    assert not status["error"]
    kept = run_of(tmp_path / "r").checkpoints
    assert len({c.files[checkpoints.BASE]["in"] for c in kept}) == 1
    first, last = (checkpoints.restore(c)["net"] for c in (kept[0], kept[-1]))
    assert torch.equal(first["0.weight"], last["0.weight"])
    assert not torch.equal(first["1.weight"], last["1.weight"])


def fails_on_one(worker: Any) -> None:
    net = torch.nn.Linear(3, 3)
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
    for batch in worker.batches():
        worker.step(functional.cross_entropy(net(batch["x"]), batch["y"], reduction="sum"))
        if worker.step_number == 5 and worker.rank == 1:
            break  # this rank alone ends early


def test_a_rank_that_ends_early_stops_the_run(table: Snapshot, tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "r", stream_of(table))
    crew = Crew(fails_on_one, stream_of(table), plan, most=2, first=2)
    status = crew.join()

    assert "1 of 2 ranks ended their loop after step 5" in status["error"]


def blows_up(worker: Any) -> None:
    net = torch.nn.Linear(3, 3)
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
    for batch in worker.batches():
        loss = functional.cross_entropy(net(batch["x"]), batch["y"], reduction="sum")
        if worker.step_number == 7 and worker.rank == 1:
            loss = loss * float("nan")
        worker.step(loss)


def test_a_loss_that_is_no_number_stops_at_the_last_good_step(
    table: Snapshot, tmp_path: Path
) -> None:
    plan = plan_of(tmp_path / "r", stream_of(table))
    crew = Crew(blows_up, stream_of(table), plan, most=2, first=2)
    status = crew.join()

    assert "loss of step 8 (epoch 0, global batch 7) is not a finite number" in status["error"]
    assert "{1: [(0, " in status["error"]
    assert run_of(tmp_path / "r").checkpoint.step == 7


def lags(worker: Any, gate: Path) -> None:
    """Until the gate's file is there, rank 1 takes its time."""
    net = torch.nn.Linear(3, 3)
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
    for batch in worker.batches():
        if worker.rank == 1 and not gate.exists():
            time.sleep(0.2)
        worker.step(functional.cross_entropy(net(batch["x"]), batch["y"], reduction="sum"))


def test_a_straggler_is_named(table: Snapshot, tmp_path: Path) -> None:
    plan, gate = plan_of(tmp_path / "r", stream_of(table)), tmp_path / "gate"
    crew = Crew(partial(lags, gate=gate), stream_of(table), plan, most=3, first=3, slow_s=1.0)
    slow = crew.wait_for(lambda s: [e for e in s["events"] if e.kind == "slow"])["events"][-1]
    pid = crew.pid_of_rank(1)
    gate.touch()

    assert crew.status()["pids"].get(slow.who, pid) == pid
    assert "times the others'" in slow.detail
    assert not crew.join()["error"]
