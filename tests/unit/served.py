"""A small registered model, and its replica behind a real uvicorn, for tests of serving."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import torch
import uvicorn

import lepton
from lepton.registry import Registry
from lepton.serving.following import Resident
from lepton.serving.protocol import request_of
from lepton.serving.replica import Replica

INPUTS = [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
URL = "/v2/models/m/infer"


def loop(worker: Any) -> None:
    net = torch.nn.Linear(3, 2)
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
    for batch in worker.batches():
        scores = net(batch["x"])
        worker.step(torch.nn.functional.cross_entropy(scores, batch["y"], reduction="sum"))


def register_model(home: Path, *names: str) -> Path:
    """Register two versions of each model; the first one is champion."""
    x = np.random.default_rng(0).normal(size=(60, 3)).astype("float32")
    rows = pa.table({"x": list(x), "y": (x.sum(1) > 0).astype("int64")})
    table = lepton.write(rows, home / "t")
    run = lepton.train(loop, table.stream(batch_size=20), name="r", home=str(home))
    registry = Registry(f"{home}/registry")
    for name in names:
        for _ in range(2):
            lepton.register(run, name, metrics={}, home=str(home))
        registry.promote(name, 1, expect=registry.state(name).pointer.seq, gate=[], trace_id="")
    return home


class Held(Resident):
    """Answers only once it may."""

    def __init__(self, like: Resident) -> None:
        super().__init__(like.version, like.predictor, like.inputs, like.traceparent, like.baggage)
        object.__setattr__(self, "go", threading.Event())
        object.__setattr__(self, "running", threading.Event())

    def run(self, rows: pa.Table) -> Any:
        self.running.set()  # type: ignore[attr-defined]
        self.go.wait(30)  # type: ignore[attr-defined]
        return super().run(rows)


def slow(replica: Replica, seconds_a_row: float) -> Held:
    """Put in a version that is held, known to take so long."""
    follower = replica._follower
    held = Held(follower.now.champion)
    follower.now = replace(follower.now, champion=held)
    replica._batcher._known(held.run).took(1, seconds_a_row)
    return held


def body(rows: int = 1, **members: Any) -> bytes:
    """A request of so many rows."""
    x = pa.table({"x": [[0.0, 1.0, 2.0]] * rows})
    return orjson.dumps(orjson.loads(request_of(x, INPUTS)) | members)


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """Have uvicorn run an application in another thread; yield where it listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        bound.listen()
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
        thread = threading.Thread(target=asyncio.run, args=[server.serve([bound])], daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)
