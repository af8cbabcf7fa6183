"""A run on a cluster whose nodes come and go; prints what became of it. Run by test_nodes.py."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"  # Ray's test cluster starts its nodes without a token

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.cluster_utils import Cluster
from torch.nn import functional

import lepton
from lepton.training.steps import attempts_of
from lepton.training.waiting import _whole

STEPS_PER_EPOCH, EPOCHS, STEP_S = 100, 200, 0.02
ENOUGH = 1e6  # a loss that says: stop
STORE = 100 * 2**20


def loop(worker: Any, stop: Path) -> None:
    """Train slowly, so that nodes have time to come and go, until the file is there."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 3).double()
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
    for batch in worker.batches():
        time.sleep(STEP_S)
        scores = net(batch["x"].double())
        loss = functional.cross_entropy(scores, batch["y"], reduction="sum")
        before = worker.step_number
        mean = worker.step(loss + ENOUGH * len(scores) * stop.exists())
        if worker.step_number > before and mean > ENOUGH / 100:  # the same on all ranks
            break


def wait_for_size(folder: Path, size: int) -> None:
    """Wait until so many workers train together."""
    end = time.monotonic() + 300
    while not (found := attempts_of(folder / "steps")) or found[-1].world_size != size:
        assert time.monotonic() < end, [a.world_size for a in found]
        time.sleep(0.05)


def main(home: Path) -> dict[str, Any]:
    """Grow, drain, grow and lose a node under one run."""
    node = {"object_store_memory": STORE}
    head = {"num_cpus": 1, "include_dashboard": False, **node}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=2, **node)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    x = np.random.default_rng(0).normal(size=(STEPS_PER_EPOCH * 40, 3)).astype("float32")
    rows = pa.table({"x": list(x), "y": x.argmax(1).astype("int64")})
    table = lepton.write(rows, home / "t")
    stream = table.stream(batch_size=40, epochs=EPOCHS, lanes=12, engine="worker")
    folder = home / "runs" / "r"
    made: list[lepton.Run] = []

    def train() -> None:
        options: dict[str, Any] = {"workers": (2, 4), "home": str(home), "audit": True}
        ends = partial(loop, stop=home / "stop")
        made.append(lepton.train(ends, stream, name="r", progress=False, **options))

    training = threading.Thread(target=train)
    training.start()
    wait_for_size(folder, 3)
    second = cluster.add_node(num_cpus=2, **node)
    wait_for_size(folder, 4)
    drain(cluster.address, second.node_id)
    wait_for_size(folder, 3)
    counted = len(_whole())  # nodes that a new run would ask for room
    cluster.remove_node(second, allow_graceful=False)
    third = cluster.add_node(num_cpus=2, **node)
    wait_for_size(folder, 4)
    cluster.remove_node(third, allow_graceful=False)
    wait_for_size(folder, 3)
    (home / "stop").touch()
    training.join(120)
    (run,) = made
    found = run.consumption(stream)
    ray.shutdown()
    return {
        "steps": run.steps,
        "counted": len(run.losses),
        "replayed": run.replayed,
        "exact": found.exact,
        "counted_while_draining": counted,
        "sizes": [attempt.world_size for attempt, _ in run.attempts],
        "pauses": [p.seconds for p in run.pauses],
    }


def drain(address: str, node_id: str) -> None:
    """Tell Ray that a node goes away in a minute."""
    from ray._raylet import GcsClient

    deadline = int((time.time() + 60) * 1000)
    preemption = 2
    accepted, why = GcsClient(address=address).drain_node(node_id, preemption, "spot", deadline)
    assert accepted, why


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))) + "\n")
