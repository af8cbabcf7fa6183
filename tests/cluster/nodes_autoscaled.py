"""A run on a cluster whose autoscaler adds nodes; prints what became of it. Run by test_nodes.py.

The nodes are real ones on this machine, started and ended by Ray's autoscaler with its provider for
tests. Everything is ended by the folder that its processes name: no other Ray is touched.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

import lepton
from lepton.cluster import free_ports
from tests.cluster.nodes import EPOCHS, STEPS_PER_EPOCH, STORE, loop, wait_for_size

HEAD, WORKER = "ray.head.default", "worker"


def config_of(address: str, workers: int) -> dict[str, Any]:
    """What the autoscaler goes by: a head of one CPU, and workers of one each."""
    return {
        "cluster_name": "grows",
        "max_workers": workers,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "use_node_id_as_ip": True,  # all of them have the same
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            HEAD: {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            WORKER: {
                "resources": {"CPU": 1, "object_store_memory": STORE},
                "node_config": {},
                "min_workers": 0,
                "max_workers": workers,
            },
        },
        "head_node_type": HEAD,
        "upscaling_speed": 20.0,
        "idle_timeout_minutes": 10,
        "auth": {"ssh_user": "nobody"},
        **{name: [] for name in ("initialization_commands", "setup_commands")},
        **{name: [] for name in ("head_setup_commands", "worker_setup_commands")},
        **{name: [] for name in ("head_start_ray_commands", "worker_start_ray_commands")},
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
    }


@contextmanager
def autoscaled(scratch: Path, workers: int) -> Iterator[str]:
    """Start a head whose autoscaler may add nodes; give its address; end all of it."""
    port, client, agent, agent_grpc, environments, metrics = free_ports(6)
    address = f"127.0.0.1:{port}"
    config = scratch / "autoscaler.json"
    config.write_text(json.dumps(config_of(address, workers)))
    told = {
        "--autoscaling-config": config,
        "--node-ip-address": "127.0.0.1",
        "--port": port,
        "--num-cpus": 1,
        "--object-store-memory": STORE,
        "--temp-dir": scratch,
        "--include-dashboard": "false",
        "--min-worker-port": 0,  # else of a range that another Ray here takes its ports of, too
        "--max-worker-port": 0,
        "--ray-client-server-port": client,
        "--dashboard-agent-listen-port": agent,
        "--dashboard-agent-grpc-port": agent_grpc,
        "--runtime-env-agent-port": environments,
        "--metrics-export-port": metrics,
    }
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"]
    with (scratch / "head.log").open("w") as log:
        head = subprocess.Popen(
            [*command, *(f"{name}={value}" for name, value in told.items())],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"},
        )
    try:
        yield address
    finally:
        with suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            head.wait(20)
        end_all(str(scratch).encode())


def end_all(named: bytes) -> None:
    """Kill every process that names a folder on its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if named in path.read_bytes() and int(path.parent.name) != os.getpid():
                os.kill(int(path.parent.name), signal.SIGKILL)


def connect(address: str) -> None:
    """Connect as soon as the head answers."""
    end = time.monotonic() + 120
    while True:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error")
        except (ConnectionError, RuntimeError):
            assert time.monotonic() < end
            time.sleep(0.5)
        else:
            return


def main(home: Path, address: str) -> dict[str, Any]:
    """Begin with one worker; go on until there are three."""
    connect(address)
    x = np.random.default_rng(0).normal(size=(STEPS_PER_EPOCH * 40, 3)).astype("float32")
    rows = pa.table({"x": list(x), "y": x.argmax(1).astype("int64")})
    table = lepton.write(rows, home / "t")
    stream = table.stream(batch_size=40, epochs=EPOCHS, lanes=12, engine="worker")
    made: list[lepton.Run] = []

    def train() -> None:
        options: dict[str, Any] = {"workers": (1, 3), "home": str(home), "audit": True}
        ends = partial(loop, stop=home / "stop")
        made.append(lepton.train(ends, stream, name="r", progress=False, **options))

    training = threading.Thread(target=train)
    training.start()
    wait_for_size(home / "runs" / "r", 3)
    nodes = sum(node["Alive"] for node in ray.nodes())
    (home / "stop").touch()
    training.join(120)
    (run,) = made
    found = run.consumption(stream)
    ray.shutdown()
    sizes = [attempt.world_size for attempt, _ in run.attempts]
    return {"nodes": nodes, "replayed": run.replayed, "exact": found.exact, "sizes": sizes}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ended early, it cleans up, too
    with (
        tempfile.TemporaryDirectory(prefix="lep", ignore_cleanup_errors=True) as folder,
        autoscaled(Path(folder), 2) as found,
    ):
        sys.stdout.write(json.dumps(main(Path(sys.argv[1]), found)) + "\n")
