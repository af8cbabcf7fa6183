"""Torch the way people write it learns the same at world sizes 1, 2 and 3. No Ray."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import lepton
from lepton.lake import Snapshot
from tests.cluster.crew import Crew, plan_of, run_of, write_rows
from tests.unit.ways import WAYS, autocast, compiled_loop, make_net, pieces, schedule_of


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return write_rows(tmp_path_factory.mktemp("lake") / "t", 600)


def stream_of(table: Snapshot) -> Any:
    return table.stream(batch_size=60, epochs=2, lanes=6, engine="worker")


def losses_of(loop: Any, table: Snapshot, folder: Path, workers: int) -> list[float]:
    stream = stream_of(table)
    plan = plan_of(folder, stream, checkpoint_every=100, audit=False)
    status = Crew(loop, stream, plan, most=workers, first=workers).join(120)
    assert not status["error"]
    run = run_of(folder)
    assert [a.world_size for a, _ in run.attempts] == [workers]
    return run.losses


def all_at_once(worker: Any) -> None:
    """bf16 autocast, accumulation, clipping, a schedule, two optimisers."""
    net: Any = make_net()
    low = torch.optim.AdamW(net[0].parameters(), lr=0.02)
    high = torch.optim.SGD(net[2].parameters(), lr=0.2, momentum=0.9)
    schedule = schedule_of(low)
    worker.attach(net=net, low=low, high=high, schedule=schedule)
    for batch in worker.batches():
        total = torch.zeros(())
        for piece in pieces(batch):
            loss = autocast(net, piece)
            loss.backward()
            total += loss.detach()
        worker.step(total, clip=0.5)
        schedule.step()


LOOPS = [
    (all_at_once, 2e-2, (2, 3)),
    (WAYS["a rule of one's own"][0], 1e-3, (3,)),
    (WAYS["two nets in turn"][0], 1e-4, (2,)),
]


@pytest.mark.parametrize(("loop", "apart", "sizes"), LOOPS)
def test_the_world_size_changes_nothing_but_the_last_bits(
    table: Snapshot, tmp_path: Path, loop: Any, apart: float, sizes: tuple[int, ...]
) -> None:
    alone = lepton.train(loop, stream_of(table), name="alone", home=str(tmp_path)).losses
    for workers in sizes:
        shared = losses_of(loop, table, tmp_path / str(workers), workers)
        assert shared == pytest.approx(alone, rel=apart)
    assert alone[-1] < alone[0]


def test_a_net_compiled_to_machine_code(table: Snapshot, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler (g++) here")
    loop = partial(compiled_loop, backend="inductor")
    expected = list(WAYS["a compiled net"][1](stream_of(table).shard(0, 1)))
    run = lepton.train(loop, stream_of(table), name="r", home=str(tmp_path))

    assert run.losses == pytest.approx(expected, rel=1e-4)
