"""Requests a second of one replica's process under load, with telemetry and without, by turns.

Two processes that do the same differ by some percent, and a machine's speed changes by as much
within seconds. So one process has three replicas of a model, and only the first one has telemetry;
``wrk`` asks them by turns of :data:`TURN_S` in changing order, without a pause. How far the other
two differ is the noise. The beginning of a turn does not count: what the one before has left behind
is written then.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import claims
from benchmarks.telemetry_once import SAMPLED, question

TURN_S, SKIP_S = 1.0, 0.25
CONNECTIONS = 8
ARMS = ("m", "off", "control")
"""Models; the first one has telemetry."""

Cycle = dict[str, int]
"""Requests of each arm in its turn."""


def serve(folder: str) -> None:
    """Serve the models of a folder until killed; print the port first."""
    import uvicorn

    from lepton.serving.replica import Replica
    from lepton.serving.shortcut import Shortcut

    apps: dict[str, Any] = {}
    for name in ARMS:
        replica: Any = Replica(name, folder)
        apps[name] = replica.__serve_build_asgi_app__()
        if name != ARMS[0]:
            replica._batcher._told = None  # whether it measures is the process's affair, else
        os.environ["OTEL_SDK_DISABLED"] = "true"  # the others'
    del os.environ["OTEL_SDK_DISABLED"]

    async def chosen(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await apps[ARMS[0]](scope, receive, send)
            return
        name = scope["path"].split("/")[1]
        await apps[name]({**scope, "root_path": f"/{name}"}, receive, send)

    config = uvicorn.Config(Shortcut(chosen), access_log=False, log_level="error", lifespan="off")
    listening = socket.create_server(("127.0.0.1", 0))
    print(listening.getsockname()[1], flush=True)
    uvicorn.Server(config).run(sockets=[listening])


def measure(
    folder: str, settings: Mapping[str, Mapping[str, str]], cycles: int
) -> dict[str, list[Cycle]]:
    """Return what was answered under each setting, cycle by cycle; nothing without ``wrk``.

    Raises:
        RuntimeError: a request failed.
    """
    import pyarrow as pa

    if shutil.which("wrk") is None:
        print("wrk is missing (apt-get install wrk): no load is measured", file=sys.stderr)
        return {}
    body = Path(folder, "question")
    body.write_bytes(question(pa))
    found: dict[str, list[Cycle]] = {}
    for name, environment in settings.items():
        with _serving(folder, environment) as port:
            found[name] = _load(port, body, cycles)
        print(
            "load", name, {arm: sum(c[arm] for c in found[name]) for arm in ARMS}, file=sys.stderr
        )
    return found


def claims_of(
    found: Mapping[str, list[Cycle]], names: Mapping[str, str], goal: float
) -> list[claims.Claim]:
    """Return what each setting costs beside the two that are off; ``names`` says what each is."""
    made: list[claims.Claim] = []
    every = [cycle for cycles in found.values() for cycle in cycles]
    if not every:
        return made
    on, *off = ARMS
    rate = statistics.median(sum(cycle[arm] for arm in off) / len(off) for cycle in every)
    title = "requests/s under load, telemetry off"
    made.append(claims.claim(title, rate / (TURN_S - SKIP_S), None, "1/s", runs=len(every)))
    for name, cycles in found.items():
        lost = [100 * (1 - c[on] * len(off) / sum(c[arm] for arm in off)) for c in cycles]
        made += _told(f"requests/s lost under load: {names[name]}", lost, goal)
    noise = [100 * (1 - cycle[off[1]] / cycle[off[0]]) for cycle in every]
    return made + _told(f"requests/s lost under load: {names['control']}", noise, None)


def _told(title: str, values: list[float], goal: float | None) -> list[claims.Claim]:
    """Return a median, and how exactly it is known: of skewed values, by their quartiles."""
    low, _, high = statistics.quantiles(values, n=4)
    error = 1.253 * (high - low) / 1.349 / math.sqrt(len(values))
    runs = len(values)
    return [
        claims.claim(title, statistics.median(values), goal, "%", -1, runs=runs),
        claims.claim(f"{title}: standard error", error, None, "%", -1, runs=runs),
    ]


@contextmanager
def _serving(folder: str, given: Mapping[str, str]) -> Generator[int]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "RAY_ADDRESS"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.telemetry_once", "server", folder],
        cwd=claims.HERE,
        env={**clean, **given},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


def _load(port: int, body: Path, cycles: int) -> list[Cycle]:
    chance = random.Random(0)
    orders = [chance.sample(ARMS, len(ARMS)) for _ in range(cycles + 1)]  # the first one warms up
    turns = [arm for order in orders for arm in order]
    told = {
        "BODY": str(body),
        "HEADERS": f"content-type: application/json\ntraceparent: {SAMPLED}",
        "PATHS": " ".join(f"/{arm}/v2/models/{arm}/infer" for arm in turns),
        "TURN_S": str(TURN_S),
        "SKIP_S": str(SKIP_S),
    }
    script = str(Path(__file__).parent / "turns.lua")
    options = ["-t1", f"-c{CONNECTIONS}", f"-d{math.ceil(len(turns) * TURN_S)}s", "-s", script]
    done = subprocess.run(
        ["wrk", *options, f"http://127.0.0.1:{port}"],
        env={**os.environ, **told},
        capture_output=True,
        text=True,
        check=True,
    )
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line[:1].isupper())
    if said["FAILED"] != "0":
        raise RuntimeError(f"{said['FAILED']} requests failed under load")
    counts = list(map(int, said["TURNS"].split()))
    return [
        dict(zip(order, counts[at : at + len(ARMS)], strict=True))
        for at, order in zip(range(0, len(counts), len(ARMS)), orders, strict=True)
    ][1:]
