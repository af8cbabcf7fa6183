"""The loop with a worker and a replica killed in it, telemetry asked for; run by test_telemetry.py.

The killed worker is replaced while the run goes on. A second run streams by Ray Data; what it gives
becomes champion after a canary, and is rolled back.

Prints a JSON line: what the run's own log says of it, how often was asked, and what Prometheus
would have scraped from Ray's endpoint.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import ray
import torch
from torch.nn import functional

import lepton
from lepton import cluster, telemetry
from lepton.pipeline.killer import kill_one_worker
from lepton.promotion import CanaryRule
from lepton.serving.protocol import request_of
from lepton.telemetry import Carrier

ASKED, UNSAMPLED = 20, 5
NOT_SAMPLED = f"00-{'ab' * 16}-{'cd' * 8}-00"
SCRAPED = ("lepton_train_rows", "lepton_train_step_duration", "http_server_request_duration")


def loop(worker: Any) -> None:
    """Train slowly enough to lose a worker in the middle."""
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 3)
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
    for batch in worker.batches():
        time.sleep(0.1 if worker.world_size == 1 else 0.005)  # until there is another one again
        worker.step(functional.cross_entropy(net(batch["x"]), batch["y"], reduction="sum"))


def quick(worker: Any) -> None:
    """Train without any trouble."""
    net = torch.nn.Linear(3, 3)
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
    for batch in worker.batches():
        worker.step(functional.cross_entropy(net(batch["x"]), batch["y"], reduction="sum"))


def main(home: str) -> dict[str, Any]:
    """Go round the loop once, under one span."""
    x = np.random.default_rng(0).normal(size=(4000, 3)).astype("float32")
    table = lepton.write(pa.table({"x": list(x), "y": x.argmax(1).astype("int64")}), f"{home}/t")
    stream = table.stream(batch_size=20, epochs=2, lanes=4, engine="worker")
    cluster.connect(_system_config={"metrics_report_interval_ms": 500})
    with telemetry.span("lepton.demo", Carrier("", f"{home}/traces")) as span:
        common: dict[str, Any] = {"home": home, "trace": span.carrier}
        with kill_one_worker(Path(home) / "runs" / "r", after_step=50):
            options = {"checkpoint_every": 50, "progress": False}
            run = lepton.train(loop, stream, name="r", workers=2, **options, **common)
        found = lepton.evaluate(run, table, label="y", **common)
        version = lepton.register(run, "m", metrics=found.metrics, **common)
        app = lepton.promote(version, gate="accuracy >= 0", **common)
        body = request_of(
            table.select(["x"]).head(2), [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
        )
        trace = span.carrier.traceparent
        replicas = [_ask(app.infer_url, body, trace) for _ in range(ASKED)]
        os.kill(replicas[-1], signal.SIGKILL)
        replicas += [_ask(app.infer_url, body, trace) for _ in range(ASKED)]
        for _ in range(UNSAMPLED):
            _ask(app.infer_url, body, NOT_SAMPLED)
        by_data = replace(stream, batch_size=200, engine="ray_data")
        second = lepton.train(quick, by_data, name="r2", workers=2, progress=False, **common)
        better = lepton.register(second, "m", metrics={"accuracy": 1.0}, **common)
        rule = CanaryRule(bake_s=1, min_requests=3)
        with _asking(app.infer_url, body) as beside:
            app = lepton.promote(better, canary=0.5, rule=rule, **common)
        lepton.rollback("m", **common)
        scraped = _scrape()
        app.close()
    told = {
        "trace_id": span.carrier.trace_id,
        "steps": run.steps,
        "rows": sum(run.history()["rows"].to_pylist()),
        "table": str(table),
        "scraped": scraped,
        "replicas": replicas,
        "version": version.version,
        "better": better.version,
        "rows_by_data": by_data.epochs * len(x),
        "asked": 2 * ASKED + UNSAMPLED + len(beside),
    }
    cluster.disconnect()
    telemetry.flush(30_000)
    return told


@contextmanager
def _asking(url: str, body: bytes) -> Generator[list[int]]:
    """Ask all the time, with nothing sampled; yield who answered."""
    answered: list[int] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.wait(0.02):
            answered.append(_ask(url, body, NOT_SAMPLED))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answered
    finally:
        stop.set()
        thread.join()


def _ask(url: str, body: bytes, traceparent: str) -> int:
    """Ask until there is an answer; return the process that gave it."""
    end = time.monotonic() + 300
    while True:
        with suppress(httpx.TransportError):
            reply = httpx.post(url, content=body, headers={"traceparent": traceparent}, timeout=120)
            if reply.status_code == 200:
                return int(reply.headers["x-lepton-replica"])
        assert time.monotonic() < end, "no answer"
        time.sleep(0.2)


def _scrape() -> list[str]:
    """Read Ray's metrics endpoint until lepton's are there, at most a minute."""
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    end = time.monotonic() + 180
    lines: list[str] = []
    while time.monotonic() < end:
        lines = [k for k in httpx.get(url, timeout=10).text.splitlines() if not k.startswith("#")]
        if all(any(name in line for line in lines) for name in SCRAPED):
            break
        time.sleep(0.2)
    return [line for line in lines if "lepton_" in line or "http_server" in line]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1])) + "\n")
