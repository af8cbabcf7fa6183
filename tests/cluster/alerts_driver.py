"""Serves a model on a Ray of its own until its standard input ends; run by test_alerts.py.

Before, it reads by Ray Data and measures a drift. Prints a JSON line: Ray's metrics endpoint,
and the process id of the replica.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import ray
import torch
from torch.nn import functional

import lepton
from lepton import cluster, telemetry
from lepton.serving.protocol import request_of


def loop(worker: Any) -> None:
    """Make some steps."""
    net = torch.nn.Linear(3, 3)
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
    for batch in worker.batches():
        worker.step(functional.cross_entropy(net(batch["x"]), batch["y"], reduction="sum"))


def main(home: str) -> None:
    """Train, promote, tell, wait."""
    x = np.random.default_rng(0).normal(size=(60, 3)).astype("float32")
    table = lepton.write(pa.table({"x": list(x), "y": x.argmax(1).astype("int64")}), f"{home}/t")
    stream = table.stream(batch_size=20, lanes=1)
    run = lepton.train(loop, stream, name="r", home=home, progress=False)
    cluster.connect(_system_config={"metrics_report_interval_ms": 500})
    by_tasks = table.stream(batch_size=20, engine="ray_data").shard(0, 1)
    assert sum(len(b["x"]) for b in by_tasks) == len(x)
    telemetry.measure("lepton.drift", 0.5, {"lepton.model": "m", "lepton.version": 2})
    version = lepton.register(run, "m", metrics={"accuracy": 1.0}, home=home)
    app = lepton.promote(version, gate="accuracy >= 0", home=home)
    inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
    body = request_of(table.select(["x"]).head(2), inputs)
    reply = httpx.post(app.infer_url, content=body, timeout=180).raise_for_status()
    node = ray.nodes()[0]
    told = {
        "target": f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}",
        "replica": int(reply.headers["x-lepton-replica"]),
    }
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    app.close()
    cluster.disconnect()


if __name__ == "__main__":
    main(sys.argv[1])
