"""Sharded models (FSDP2): checkpoints in parts, read at another world size, and losses mended."""

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import lepton
from lepton import checkpoints
from lepton.checkpoints.shards import SHARDS
from lepton.export.restore import Predictor
from lepton.lake import Snapshot
from lepton.training.run import Run
from lepton.training.validation import Validation
from tests.cluster.crew import Crew, plan_of, run_of, write_rows

ROWS, BATCH, EVERY = 800, 40, 5


def net_of() -> torch.nn.Module:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 10), torch.nn.ReLU(), torch.nn.Linear(10, 3))
    net.register_buffer("seen", torch.zeros(()))
    return net.double()


class Net(torch.nn.Module):
    """Takes columns as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net_of()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.double())


def loop(worker: Any, until: int | None = None, gates: dict[int, Path] | None = None) -> None:
    """Train a net sharded over all workers; at a gated step wait until the gate's file is there."""
    from torch.distributed.fsdp import fully_shard

    net = Net()
    fully_shard(net.inner[0], mesh=worker.mesh)
    fully_shard(net, mesh=worker.mesh)
    worker.attach(net=net, opt=torch.optim.Adam(net.parameters(), lr=0.01))
    for batch in worker.batches():
        while (gate := (gates or {}).get(worker.step_number)) and not gate.exists():
            time.sleep(0.01)
        loss = functional.cross_entropy(net(batch["x"]), batch["y"], reduction="sum")
        worker.step(loss, clip=5.0)
        if worker.step_number == until:
            break


def whole_loop(worker: Any) -> None:
    """The same, not sharded."""
    net = Net()
    worker.attach(net=net, opt=torch.optim.Adam(net.parameters(), lr=0.01))
    for batch in worker.batches():
        loss = functional.cross_entropy(net(batch["x"]), batch["y"], reduction="sum")
        worker.step(loss, clip=5.0)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return write_rows(tmp_path_factory.mktemp("lake") / "t", ROWS)


def judged_by(table: Snapshot) -> Validation:
    return Validation(table, label="y", every=10, batch_size=70)


def stream_of(table: Snapshot) -> Any:
    return table.stream(batch_size=BATCH, epochs=2, lanes=12, engine="worker")


@pytest.fixture(scope="module")
def whole(table: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> Run:
    home = str(tmp_path_factory.mktemp("home"))
    told: dict[str, Any] = {"home": home, "progress": False, "validate": judged_by(table)}
    return lepton.train(whole_loop, stream_of(table), name="whole", **told)


def check(run: Run, whole: Run, table: Snapshot) -> None:
    stream = stream_of(table)
    assert run.steps == whole.steps == stream.steps
    assert run.consumption(stream).exact
    assert run.losses == pytest.approx(whole.losses, rel=1e-6)
    assert SHARDS in run.checkpoint.files
    mine, its = (checkpoints.restore(r.checkpoint) for r in (run, whole))
    for name, value in its["net"].items():
        assert torch.allclose(mine["net"][name], value, rtol=1e-9, atol=1e-12), name
    for i, state in its["opt"]["state"].items():
        for name, value in state.items():
            found = mine["opt"]["state"][i][name]
            assert torch.allclose(found, value, rtol=1e-6, atol=1e-12), (i, name)


def test_written_and_read_at_other_world_sizes(table: Snapshot, whole: Run, tmp_path: Path) -> None:
    """4 ranks, one and 3 make a part of the run each, from what those before them wrote."""
    stream = stream_of(table)
    for life, (size, until) in enumerate([(4, 8), (1, 16), (3, None)]):
        plan = plan_of(tmp_path / "r", stream, checkpoint_every=EVERY)
        crew = Crew(partial(loop, until=until), stream, plan, most=size, first=size)
        status = crew.join()
        assert not status["error"]
        run = run_of(tmp_path / "r")
        assert [a.world_size for a, _ in run.attempts][life] == size
        kept = [n for n in run.checkpoint.files if n.startswith("shard-")]
        assert len(kept) == size

    check(run, whole, table)
    assert run.replayed == 0
    rows = table.to_arrow().select(["x"]).slice(0, 9)
    expected = Predictor(whole.checkpoint)(rows)["output"]
    assert torch.allclose(Predictor(run.checkpoint)(rows)["output"], expected, rtol=1e-9)
    assert lepton.register(run, "m", home=str(tmp_path)).size == run.checkpoint.size


def test_a_killed_worker_sends_all_back_to_the_checkpoint_in_the_same_processes(
    table: Snapshot, whole: Run, tmp_path: Path
) -> None:
    judged = judged_by(table).settled(stream_of(table))
    plan = plan_of(tmp_path / "r", stream_of(table), checkpoint_every=10, validation=judged)
    gate = tmp_path / "gate"
    crew = Crew(partial(loop, gates={13: gate}), stream_of(table), plan, most=3, first=3)
    crew.wait_for(
        lambda s: list(s["members"].values()) == [13] * 3 and bool(checkpoints.all_of(plan.kept_in))
    )
    pids = [crew.pid_of_rank(r) for r in range(3)]
    os.kill(pids[1], signal.SIGKILL)
    gate.touch()
    status = crew.join()

    assert not status["error"]
    run = run_of(tmp_path / "r")
    before, after = (a for a, _ in run.attempts)
    assert (before.world_size, after.world_size) == (3, 2)
    assert after.step == 10
    assert set(after.pids) == {pids[0], pids[2]}, "the same processes"
    assert run.replayed == 3
    check(run, whole, table)
    mine, its = (
        r.evaluations().drop_columns(["seconds", "workers", "time"]).to_pylist()
        for r in (run, whole)
    )
    assert len(mine) == len(its) == 4
    for found, expected in zip(mine, its, strict=True):
        assert found["confusion"] == expected["confusion"]
        figures = {k: v for k, v in expected.items() if isinstance(v, float)}
        assert {k: found[k] for k in figures} == pytest.approx(figures, rel=1e-6)
        assert (found["step"], found["rows"]) == (expected["step"], expected["rows"])


def test_a_newcomer_joins_with_nothing_made_again(
    table: Snapshot, whole: Run, tmp_path: Path
) -> None:
    plan = plan_of(tmp_path / "r", stream_of(table), checkpoint_every=100)
    gate = tmp_path / "gate"
    crew = Crew(partial(loop, gates={7: gate}), stream_of(table), plan, most=3, first=2)
    crew.wait_for(lambda s: list(s["members"].values()) == [7] * 2)
    crew.add()
    crew.wait_for(lambda s: len(s["waiting"]) == 1)
    gate.touch()
    status = crew.join()

    assert not status["error"]
    run = run_of(tmp_path / "r")
    assert [a.world_size for a, _ in run.attempts] == [2, 3]
    assert run.replayed == 0
    check(run, whole, table)
