"""Nodes with one training run on them: ``python -m benchmarks.elastic_sites PEER FOLDER``.

Starts with one node of two workers and takes commands, a word a line, from standard input: ``add``
a node of two more workers, ``drain`` it (it is said that it goes away, then it does), ``lose`` it
(all of its processes are killed at once). lepton and stock Ray Train run on ``ray.cluster_utils``'
cluster, whose nodes are real ones in processes of their own; for torchrun a node is its agent.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.elastic_peers import BATCH, EPOCHS, EVERY, data_of, lepton_loop, ray_loop

EACH, MOST = 2, 4
NOTICE_S = 20
"""How long before it goes a node is said to go."""
STORE = 100 * 2**20


class RayNodes:
    """Nodes of a Ray cluster on this machine."""

    def __init__(self) -> None:
        os.environ["RAY_AUTH_MODE"] = "disabled"  # Ray's test cluster starts its nodes without
        import ray
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE}
        self._cluster: Any = Cluster(initialize_head=True, head_node_args=head)
        self._added: Any = None
        self.add()
        ray.init(address=self._cluster.address, log_to_driver=False, logging_level="error")

    def add(self) -> None:
        """Add a node of two workers."""
        self._added = self._cluster.add_node(num_cpus=EACH, object_store_memory=STORE)

    def drain(self) -> None:
        """Tell Ray that the added node goes away; take it away when nobody works there."""
        from ray._raylet import GcsClient

        deadline = int((time.time() + NOTICE_S) * 1000)
        preemption = 2
        told = GcsClient(address=self._cluster.address)
        told.drain_node(self._added.node_id, preemption, "spot", deadline)
        node = self._added

        def take_away() -> None:
            time.sleep(NOTICE_S)
            self._cluster.remove_node(node, allow_graceful=False)

        threading.Thread(target=take_away, daemon=True).start()

    def lose(self) -> None:
        """Kill the added node, with all of its processes."""
        self._cluster.remove_node(self._added, allow_graceful=False)


class Agents:
    """torchrun's agents, the first of which holds the rendezvous."""

    def __init__(self, folder: str) -> None:
        from lepton.cluster import free_ports

        self._folder = folder
        self._port = free_ports(1)[0]
        self._first = self._start()
        self._added: subprocess.Popen[bytes] | None = None

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run"),
                f"--nnodes=1:{MOST // EACH}",
                f"--nproc-per-node={EACH}",
                "--max-restarts=100",
                "--monitor-interval=0.1",
                "--rdzv-backend=c10d",
                f"--rdzv-endpoint=127.0.0.1:{self._port}",
                "--rdzv-id=elastic",
                "--local-addr=127.0.0.1",
                "--rdzv-conf=last_call_timeout=1",
                *("-m", "benchmarks.elastic_peers", "torchrun_worker", self._folder),
            ],
            start_new_session=True,
            # agents that share a store wait for ever for its address in a second round
            env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        )

    def add(self) -> None:
        """Start another agent."""
        self._added = self._start()

    def drain(self) -> None:
        """End the other agent as an instance that is taken back would."""
        assert self._added is not None
        os.killpg(self._added.pid, signal.SIGTERM)

    def lose(self) -> None:
        """Kill the other agent with its workers."""
        assert self._added is not None
        for pid in [*_children(self._added.pid), self._added.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill all of them."""
        for agent in (self._first, self._added):
            if agent is None:
                continue
            for pid in [*_children(agent.pid), agent.pid]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    with suppress(OSError):
        mine = [int(p) for p in found.read_text().split()]
        return [*mine, *(c for child in mine for c in _children(child))]
    return []


def lepton(folder: str) -> None:
    """Train by lepton, on two to four workers."""
    import pyarrow as pa

    import lepton

    x, y = data_of()
    table = lepton.write(pa.table({"x": list(x), "y": y}), f"{folder}/table")
    stream = table.stream(batch_size=BATCH, epochs=EPOCHS, lanes=12, engine="worker")
    options: dict[str, Any] = {"home": folder, "checkpoint_every": EVERY, "progress": False}
    loop = functools.partial(lepton_loop, folder=folder)
    lepton.train(loop, stream, name="r", workers=(EACH, MOST), max_failures=100, **options)


def ray_train(folder: str) -> None:
    """Train by stock Ray Train, on two to four workers."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        ray_loop,
        train_loop_config={"folder": folder},
        scaling_config=ScalingConfig(
            num_workers=(EACH, MOST), elastic_resize_monitor_interval_s=1.0
        ),
        run_config=RunConfig(
            storage_path=f"{folder}/ray", failure_config=FailureConfig(max_failures=100)
        ),
    ).fit()


def main(peer: str, folder: str) -> None:
    """Train, and do what is said on standard input."""
    site: Any
    if peer == "torchrun":
        site = Agents(folder)
    else:
        site = RayNodes()
        trains: Callable[[str], None] = {"lepton": lepton, "ray_train": ray_train}[peer]
        threading.Thread(target=trains, args=(folder,), daemon=True).start()
    try:
        for line in sys.stdin:
            getattr(site, line.strip())()
    finally:
        if isinstance(site, Agents):
            site.end()
        else:
            import ray

            ray.shutdown()
            site._cluster.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
