"""A run that its driver may not survive; prints what became of it. Run by test_driver.py."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional

import lepton


def loop(worker: Any) -> None:
    """Train slowly enough to be killed in the middle."""
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 3).double()
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
    for batch in worker.batches():
        time.sleep(0.01)
        scores = net(batch["x"].double())
        worker.step(functional.cross_entropy(scores, batch["y"], reduction="sum"))


def main(home: str, checkpoints: str | None = None) -> dict[str, Any]:
    """Train by one name, from wherever it stands."""
    try:
        table = lepton.table(f"{home}/t")
    except lepton.errors.LakeError:
        x = np.random.default_rng(0).normal(size=(2000, 3)).astype("float32")
        rows = pa.table({"x": list(x), "y": x.argmax(1).astype("int64")})
        table = lepton.write(rows, f"{home}/t")
    stream = table.stream(batch_size=20, epochs=3, lanes=4, engine="worker")
    options: dict[str, Any] = {"home": home, "audit": True, "progress": False}
    options["checkpoints"] = checkpoints
    run = lepton.train(loop, stream, name="r", workers=2, checkpoint_every=20, **options)
    found = run.consumption(stream)
    starts = [a.step for a, _ in run.attempts]
    return {"steps": run.steps, "exact": found.exact, "replayed": run.replayed, "starts": starts}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*sys.argv[1:])) + "\n")
