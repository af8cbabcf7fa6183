"""One training run under one peer, on its own: ``python -m benchmarks.elastic_peers PEER FOLDER``.

All peers train the same net on the same rows with the same global batch, and write a checkpoint
every :data:`EVERY` steps. Every rank appends ``step time_ns`` to a file of its own when it has made
a step, so that what a kill cost is read from the workers themselves.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from pathlib import Path
from typing import Any

WORKERS, EVERY, BATCH, ROWS, WIDTH = 3, 50, 96, 96 * 100, 256
EPOCHS = 1000  # the harness ends a run


def net_of() -> Any:
    """The net that all peers train."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, WIDTH), torch.nn.ReLU()]
    layers += [torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, 10)]
    return torch.nn.Sequential(*layers)


def data_of() -> tuple[Any, Any]:
    """Rows of 64 numbers and their labels."""
    import numpy as np

    x = np.random.default_rng(0).normal(size=(ROWS, 64)).astype("float32")
    return x, x[:, :10].argmax(1).astype("int64")


class Steps:
    """A rank's record of the steps that it saw made."""

    def __init__(self, folder: str) -> None:
        name = f"{time.time_ns()}-{os.getpid()}.steps"
        self._file = os.open(Path(folder) / name, os.O_APPEND | os.O_CREAT | os.O_WRONLY)

    def made(self, step: int) -> None:
        """Append one."""
        os.write(self._file, f"{step} {time.time_ns()} {os.getpid()}\n".encode())


def lepton_loop(worker: Any, folder: str) -> None:
    """A lepton loop."""
    import torch
    from torch.nn import functional

    net = net_of()
    steps = Steps(folder)
    worker.attach(net=net, opt=torch.optim.Adam(net.parameters()))
    for batch in worker.batches():
        before = worker.step_number
        worker.step(functional.cross_entropy(net(batch["x"]), batch["y"], reduction="sum"))
        if worker.step_number > before:
            steps.made(worker.step_number)


def lepton(folder: str) -> None:
    """Train by lepton on a local Ray."""
    import pyarrow as pa

    import lepton

    x, y = data_of()
    table = lepton.write(pa.table({"x": list(x), "y": y}), f"{folder}/table")
    stream = table.stream(batch_size=BATCH, epochs=EPOCHS, lanes=12, engine="worker")
    options: dict[str, Any] = {"home": folder, "checkpoint_every": EVERY, "progress": False}
    loop = functools.partial(lepton_loop, folder=folder)
    lepton.train(loop, stream, name="r", workers=WORKERS, max_failures=100, **options)


def plain_loop(folder: str, rank: int, world_size: int, restore: Any, save: Any) -> None:
    """What people write themselves: DDP over an epoch's permutation, restored from a file."""
    import torch
    from torch.nn import functional
    from torch.nn.parallel import DistributedDataParallel

    net = net_of()
    opt = torch.optim.Adam(net.parameters())
    step = restore(net, opt)
    wrapped = DistributedDataParallel(net)
    x, y = (torch.from_numpy(a) for a in data_of())
    steps = Steps(folder)
    for epoch in range(step * BATCH // ROWS, EPOCHS):
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch))
        for at in range(step * BATCH % ROWS, ROWS, BATCH):
            mine = order[at + rank : at + BATCH : world_size]
            loss = functional.cross_entropy(wrapped(x[mine]), y[mine])
            opt.zero_grad()
            loss.backward()
            opt.step()
            step += 1
            steps.made(step)
            if step % EVERY == 0:
                save(step, net, opt)


def _load(path: Path, net: Any, opt: Any) -> int:
    import torch

    if not path.is_file():
        return 0
    kept = torch.load(path, weights_only=True)
    net.load_state_dict(kept["net"])
    opt.load_state_dict(kept["opt"])
    return int(kept["step"])


def _store(path: Path, step: int, net: Any, opt: Any) -> None:
    import torch

    torch.save({"step": step, "net": net.state_dict(), "opt": opt.state_dict()}, f"{path}.tmp")
    Path(f"{path}.tmp").replace(path)


def torchrun_worker(folder: str) -> None:
    """One rank under torchrun."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    path = Path(folder) / "checkpoint.pt"

    def save(step: int, net: Any, opt: Any) -> None:
        if rank == 0:
            _store(path, step, net, opt)

    plain_loop(folder, rank, dist.get_world_size(), functools.partial(_load, path), save)


def torchrun(folder: str) -> None:
    """Train by torchrun, which restarts all workers when one is lost."""
    from torch.distributed.run import main

    main(
        [
            "--nnodes=1",
            f"--nproc-per-node={WORKERS}",
            "--max-restarts=100",
            "--monitor-interval=0.1",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=127.0.0.1:0",
            "-m",
            "benchmarks.elastic_peers",
            "torchrun_worker",
            folder,
        ]
    )


def ray_loop(config: dict[str, Any]) -> None:
    """One rank under stock Ray Train."""
    import tempfile

    import ray.train

    context = ray.train.get_context()

    def restore(net: Any, opt: Any) -> int:
        kept = ray.train.get_checkpoint()
        if kept is None:
            return 0
        with kept.as_directory() as where:
            return _load(Path(where) / "checkpoint.pt", net, opt)

    def save(step: int, net: Any, opt: Any) -> None:
        if context.get_world_rank() != 0:
            ray.train.report({"step": step})
            return
        with tempfile.TemporaryDirectory() as where:
            _store(Path(where) / "checkpoint.pt", step, net, opt)
            ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(where))

    rank, size = context.get_world_rank(), context.get_world_size()
    plain_loop(config["folder"], rank, size, restore, save)


def ray_train(folder: str) -> None:
    """Train by stock Ray Train."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from lepton import cluster

    cluster.connect()
    TorchTrainer(
        ray_loop,
        train_loop_config={"folder": folder},
        scaling_config=ScalingConfig(num_workers=WORKERS),
        run_config=RunConfig(
            storage_path=f"{folder}/ray", failure_config=FailureConfig(max_failures=100)
        ),
    ).fit()


PEERS = {f.__name__: f for f in (lepton, torchrun, torchrun_worker, ray_train)}

if __name__ == "__main__":
    PEERS[sys.argv[1]](sys.argv[2])
