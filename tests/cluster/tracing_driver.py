"""Training by somebody who has Ray trace all that it does; run by test_tracing_beside.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

import lepton
from lepton import telemetry

THEIRS = "THEIR_SPANS"
"""Variable with the folder of their spans."""


def hook() -> None:
    """Set tracing up, as Ray calls it in each process: a line a span."""
    path = Path(os.environ[THEIRS], f"{os.getpid()}.jsonl")
    out = path.open("a", buffering=1)
    exporter = ConsoleSpanExporter(out=out, formatter=lambda s: s.to_json(indent=None) + "\n")
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)


@ray.remote
def theirs() -> str:
    """What they would have traced."""
    return "done"


def loop(worker: Any) -> None:
    """Train without any trouble."""
    net = torch.nn.Linear(3, 1)
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
    for batch in worker.batches():
        worker.step(net(batch["x"]).square().sum())


def main(home: str) -> None:
    """Train under their tracing and under a span of ours."""
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        _tracing_startup_hook="tests.cluster.tracing_driver:hook",
    )
    x = np.random.default_rng(0).normal(size=(400, 3)).astype("float32")
    stream = lepton.write(pa.table({"x": list(x)}), f"{home}/t").stream(batch_size=40, lanes=2)
    with telemetry.span("lepton.demo", telemetry.Carrier("", f"{home}/traces")) as demo:
        assert ray.get(theirs.remote()) == "done"
        options: dict[str, Any] = {"home": home, "trace": demo.carrier, "progress": False}
        lepton.train(loop, stream, name="r", workers=2, **options)
        assert ray.get(theirs.remote()) == "done"
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
