"""Requests a second of one replica under load, with telemetry and without, side by side.

For each setting a replica's application runs under uvicorn in a process of its own, all at the same
time; ``wrk`` asks one after the other for :data:`SECONDS`, round after round, forwards and
backwards by turns. "Off" runs twice: what the two differ by is the noise.
"""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import claims
from benchmarks.telemetry_once import SAMPLED, question

SECONDS = 2
CONNECTIONS = 8
_TICKS = os.sysconf("SC_CLK_TCK")


class Load(NamedTuple):
    """What one server did in one round: requests a second, CPU seconds each, and failures."""

    rate: float
    cpu: float
    failed: int


def serve(folder: str) -> None:
    """Serve the model of a folder until killed; print the port first."""
    import uvicorn

    from lepton.serving.replica import Replica
    from lepton.serving.shortcut import Shortcut

    replica: Any = Replica("m", folder)
    app = Shortcut(replica.__serve_build_asgi_app__())
    config = uvicorn.Config(app, root_path="/m", access_log=False, log_level="error")
    listening = socket.create_server(("127.0.0.1", 0))
    print(listening.getsockname()[1], flush=True)
    uvicorn.Server(config).run(sockets=[listening])


def measure(
    folder: str, settings: Mapping[str, Mapping[str, str]], rounds: int
) -> dict[str, list[Load]]:
    """Return what each setting's server did, round by round; nothing without ``wrk``."""
    import pyarrow as pa

    if shutil.which("wrk") is None:
        print("wrk is missing (apt-get install wrk): no load is measured", file=sys.stderr)
        return {}
    body = Path(folder, "question")
    body.write_bytes(question(pa))
    with ExitStack() as stack:
        servers = {n: _started(stack, folder, given) for n, given in settings.items()}
        kept: dict[str, list[Load]] = {name: [] for name in settings}
        for turn in range(-1, rounds):
            for name in list(servers)[:: 1 if turn % 2 else -1]:
                found = _load(*servers[name], body)
                if turn >= 0:  # the first one warms up
                    kept[name].append(found)
            print("load", {n: loads[-1:] for n, loads in kept.items()}, file=sys.stderr)
    return kept


def claims_of(
    found: Mapping[str, list[Load]], names: Mapping[str, str], goal: float
) -> list[claims.Claim]:
    """Return what each setting costs beside the two that are off; ``names`` says what each is."""
    made: list[claims.Claim] = []
    if not found:
        return made
    off = list(zip(found["off"], found["control"], strict=True))
    runs = len(off)
    rate = statistics.median((a.rate + b.rate) / 2 for a, b in off)
    made.append(claims.claim("requests/s under load, telemetry off", rate, None, "1/s", runs=runs))
    for name, text in names.items():
        both = list(zip(found[name], off, strict=True))
        if name == "control":
            rates = [b.rate / a.rate for a, b in off]
            cpus = [b.cpu / a.cpu for a, b in off]
        else:
            rates = [one.rate / ((a.rate + b.rate) / 2) for one, (a, b) in both]
            cpus = [one.cpu / ((a.cpu + b.cpu) / 2) for one, (a, b) in both]
        limit = None if name == "control" else goal
        lost = 100 * (1 - statistics.median(rates))
        title = f"requests/s lost under load: {text}"
        made.append(claims.claim(title, lost, limit, "%", -1, runs=runs))
        more = 100 * (statistics.median(cpus) - 1)
        title = f"CPU of the replica's process more a request under load: {text}"
        made.append(claims.claim(title, more, None, "%", -1, runs=runs))
    failed = sum(load.failed for loads in found.values() for load in loads)
    made.append(claims.claim("requests failed under load", failed, 0, "requests", -1, runs=runs))
    return made


def _started(
    stack: ExitStack, folder: str, given: Mapping[str, str]
) -> tuple[subprocess.Popen[str], int]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "RAY_ADDRESS"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.telemetry_once", "server", folder],
        cwd=claims.HERE,
        env={**clean, **given},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def _load(process: subprocess.Popen[str], port: int, body: Path) -> Load:
    headers = f"content-type: application/json\ntraceparent: {SAMPLED}"
    env = {**os.environ, "BODY": str(body), "HEADERS": headers}
    script = str(Path(__file__).parent / "load.lua")
    where = f"http://127.0.0.1:{port}/v2/models/m/infer"
    options = ["-t1", f"-c{CONNECTIONS}", f"-d{SECONDS}s", "-s", script]
    before = _cpu(process.pid)
    done = subprocess.run(["wrk", *options, where], env=env, capture_output=True, text=True)
    time.sleep(0.3)  # what waits is written and sent meanwhile
    cpu = _cpu(process.pid) - before
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT"))
    count, took_us, broken, refused = map(int, line.split()[1:5])
    return Load(count / took_us * 1e6, cpu / count, broken + refused)


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS
