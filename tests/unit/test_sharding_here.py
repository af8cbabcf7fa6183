"""A sharded net in this process, without Ray: the same loop, for debugging."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

import lepton
from lepton.errors import TrainingError
from lepton.export.restore import Predictor


def make_loop(*, sharded: bool = True, fail_at: int = -1) -> Any:
    def loop(worker: Any) -> None:
        from torch.distributed.fsdp import fully_shard

        torch.manual_seed(0)
        net = torch.nn.Linear(3, 3)
        if sharded:
            fully_shard(net, mesh=worker.mesh)
        worker.attach(net=net, opt=torch.optim.Adam(net.parameters(), lr=0.01))
        for batch in worker.batches():
            if worker.step_number == fail_at:
                raise ZeroDivisionError
            worker.step(functional.cross_entropy(net(batch["x"]), batch["y"], reduction="sum"))

    return loop


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Any:
    x = np.random.default_rng(0).normal(size=(120, 3)).astype("float32")
    rows = pa.table({"x": list(x), "y": x.argmax(1).astype("int64")})
    return lepton.write(rows, tmp_path_factory.mktemp("lake") / "t")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_one_worker_trains_resumes_and_serves(table: Any, tmp_path: Path) -> None:
    stream = table.stream(batch_size=10, lanes=1)
    options: dict[str, Any] = {"home": str(tmp_path), "checkpoint_every": 4, "progress": False}
    plain = lepton.train(make_loop(sharded=False), stream, name="plain", **options)
    with pytest.raises(ZeroDivisionError):
        lepton.train(make_loop(fail_at=6), stream, name="r", **options)
    assert not dist.is_initialized()
    run = lepton.train(make_loop(), stream, name="r", **options)

    assert [a.step for a, _ in run.attempts] == [0, 4]
    assert run.losses == pytest.approx(plain.losses, rel=1e-5)
    rows = table.to_arrow().select(["x"])
    expected = Predictor(plain.checkpoint)(rows)["output"]
    assert torch.allclose(Predictor(run.checkpoint)(rows)["output"], expected, rtol=1e-4)
    more = table.stream(batch_size=10, lanes=1, epochs=2)
    longer = lepton.train(make_loop(sharded=False), more, name="r", **options)
    assert longer.steps == 24, "what was written in parts is read as a whole, too"
    back = lepton.train(make_loop(), more.with_lanes(1), name="r", **options)
    assert back.steps == 24


def own_mesh(worker: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = torch.nn.Linear(3, 3)
    fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
    worker.attach(net=net)


def late(worker: Any) -> None:
    worker.attach(net=torch.nn.Linear(3, 3))
    _ = worker.mesh


def test_what_cannot_be_sharded_is_refused(table: Any, tmp_path: Path) -> None:
    rows = table.stream(batch_size=10, lanes=1)
    here: dict[str, Any] = {"home": str(tmp_path), "progress": False}
    with pytest.raises(TrainingError, match="cannot be exact=True"):
        lepton.train(make_loop(), rows, name="e", exact=True, **here)
    with pytest.raises(TrainingError, match=r"before worker\.attach"):
        lepton.train(late, rows, name="l", **here)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(TrainingError, match="a mesh of its own"):
            lepton.train(own_mesh, rows, name="o", **here)
    finally:
        dist.destroy_process_group()
