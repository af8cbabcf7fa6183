"""What test_two_machines.py runs on its machines; prints one line.

``nodes`` counts those that are alive, ``serve HOME`` lists what is warned of without a host and
with one, and serves a model on all of them, ``ask N URL…`` sends each URL requests, in turn, and
counts answers by URL and replica, and failures.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest


def nodes() -> int:
    import ray

    from lepton import cluster

    cluster.connect()
    return sum(bool(node["Alive"]) for node in ray.nodes())


def serve(home: str) -> dict[str, Any]:
    import numpy as np
    import pyarrow as pa

    import lepton
    from lepton.serving import Service
    from tests.cluster.world import loop

    x = np.random.default_rng(0).normal(5, 2, (200, 3)).astype("float32")
    rows = pa.table({"x": list(x), "y": (x.sum(1) > 15).astype("int64")})
    table = lepton.write(rows, Path(home) / "lake" / "t")
    run = lepton.train(loop, table.stream(batch_size=50), name="r", home=home)
    told = {"warned": [warned(host) for host in (None, "0.0.0.0")]}
    model = lepton.register(run, "m", metrics={}, home=home)
    service = Service(host="0.0.0.0", access=(), resources={"CPU": 1})
    app = lepton.promote(model, home=home, replicas=2, service=service)
    return {"url": app.infer_url, **told}


def warned(host: str | None) -> list[str]:
    """What lepton would warn of before it started Serve there."""
    from lepton import cluster
    from lepton.serving import app

    told: list[str] = []
    cluster.connect()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app.log, "warning", lambda text, *rest: told.append(text % rest))
        app._tell_what_is_slow(host)
    return told


def ask(requests: int, urls: list[str]) -> dict[str, Any]:
    import numpy as np
    import pyarrow as pa

    from lepton.serving.protocol import request_of
    from tests.cluster.world import INPUTS

    body = request_of(pa.table({"x": [np.ones(3, "float32")]}), INPUTS)
    found: Counter[str] = Counter()
    failed: list[str] = []
    for i in range(requests):
        url = urls[i % len(urls)]
        try:
            reply = httpx.post(url, content=body, timeout=10)
        except httpx.HTTPError as e:
            failed.append(f"{url}: {type(e).__name__}: {e}")
            continue
        if reply.status_code == 200:
            found[f"{url} {reply.headers['x-lepton-replica']}"] += 1
        else:
            failed.append(f"{url}: {reply.status_code} {reply.text[:200]}")
    return {"answers": found, "failed": failed}


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "nodes":
        sys.stdout.write(f"{nodes()}\n")
    elif what == "serve":
        sys.stdout.write(f"{json.dumps(serve(rest[0]))}\n")
    else:
        sys.stdout.write(f"{json.dumps(ask(int(rest[0]), rest[1:]))}\n")
