"""A table, versions of a model made from it, and clients that ask for answers all the time."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import torch

import lepton
from lepton.lake import Snapshot
from lepton.preprocess import Preparation
from lepton.registry import ModelVersion, Registry
from lepton.serving.protocol import request_of

INPUTS = [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]


def request(world: World) -> bytes:
    """A request with one row."""
    return request_of(world.table.select(["x"]).head(1), INPUTS)


def loop(worker: Any) -> None:
    """Train a net that another stream makes another."""
    torch.manual_seed(worker.step_number)
    net = torch.nn.Linear(3, 2)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    worker.attach(net=net, opt=opt)
    for batch in worker.batches():
        scores = net(batch["x"])
        worker.step(torch.nn.functional.cross_entropy(scores, batch["y"], reduction="sum"))


class World:
    """A table, four registered versions of a model, an app that serves it, and their home."""

    def __init__(self, home: Path) -> None:
        self.home = str(home)
        x = np.random.default_rng(0).normal(5, 2, (600, 3)).astype("float32")
        y = (x.sum(1) > 15).astype("int64")
        rows = pa.table({"x": list(x), "y": y})
        self.table: Snapshot = lepton.write(rows, home / "lake" / "t")
        prepare = Preparation.fit(self.table, standard=["x"])
        self.versions = []
        for seed in range(4):
            stream = self.table.stream(batch_size=50, epochs=2, seed=seed, transform=prepare)
            run = lepton.train(loop, stream, name=f"r{seed}", home=self.home)
            found = lepton.evaluate(run, self.table, label="y", home=self.home)
            self.versions.append(lepton.register(run, "m", metrics=found.metrics, home=self.home))
        self.registry = Registry(f"{self.home}/registry")
        self.app = lepton.promote(self.versions[0], home=self.home, replicas=(1, 2))

    def champion(self) -> ModelVersion:
        """The version that answers."""
        return self.registry.version("m", self.registry.state("m").pointer.champion)


def post(app: Any, body: str | bytes) -> httpx.Response:
    """Ask an app for its model's answers."""
    return httpx.post(app.infer_url, content=body, timeout=120)


def wait_until(condition: Any) -> None:
    """Poll until something holds.

    Raises:
        AssertionError: it does not within five minutes.
    """
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end, "waited five minutes in vain"
        time.sleep(0.1)


class Load:
    """A client that keeps asking from another thread and notes every answer."""

    def __init__(self, world: World, rows: np.ndarray[Any, Any] | None = None) -> None:
        self._world = world
        self._rows = rows
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self.versions: list[str] = []
        self.replicas: list[str] = []
        self.failed: list[str] = []
        self.cut = 0

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def more(self, requests: int) -> None:
        until = len(self.versions) + requests
        wait_until(lambda: len(self.versions) >= until or self.failed)

    def _ask(self) -> None:
        body, at = request(self._world), 0
        with httpx.Client(timeout=90) as http:
            while not self._stop.is_set():
                if self._rows is not None:
                    body = request_of(pa.table({"x": [self._rows[at % len(self._rows)]]}), INPUTS)
                    at += 1
                began = time.monotonic()
                try:
                    reply = http.post(self._world.app.infer_url, content=body)
                except httpx.HTTPError as e:
                    if "complete message body" in str(e):
                        self.cut += 1  # the replica died between its headers and its body
                        continue
                    waited = time.monotonic() - began
                    self.failed.append(f"{type(e).__name__} after {waited:.1f} s: {e}")
                    continue
                if reply.status_code == 200:
                    self.versions.append(reply.json()["model_version"])
                    self.replicas.append(reply.headers["x-lepton-replica"])
                else:
                    self.failed.append(reply.text)
