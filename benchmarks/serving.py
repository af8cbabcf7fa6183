"""Requests per second beside what people use: plain FastAPI, Ray Serve, LitServe, BentoML.

``python -m benchmarks.serving [--quick] [--python-for litserve=PATH --python-for bentoml=PATH]``
serves one small MLP from each of them, one after the other, each with the machine for itself, and
puts the same load on it with ``wrk`` (installed by apt if missing), several rounds. Plain FastAPI
is measured twice in each round: how far the two differ is how noisy the machine is. LitServe and
BentoML pin what lepton needs newer, so each needs an environment of its own with torch. Writes
``results/serving.json`` and a picture.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import claims, serving_layers, serving_model

PATH = "/digits/v2/models/digits/infer"
PEERS = ("fastapi", "ray_serve", "litserve", "bentoml", "lepton")
AGAIN = "fastapi, again"
ONE = "1 row, JSON"
NO_BINARY = ("litserve",)
CLIENTS = (8, 64)
"""So many ask at a time, each again when it has its answer."""
UP_S = 120.0
PORT = 8710
WARM_S = 2.0


@dataclass(frozen=True)
class Load:
    """What one server did in one round."""

    rate: float
    failed: int
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Request:
    """A body and its headers, and how many clients ask so at a time."""

    name: str
    body: str
    headers: Mapping[str, str]
    clients: int = CLIENTS[0]


def measure(port: int, request: Request, seconds: float) -> Load:
    """Put load on a server."""
    env = dict(os.environ)
    env["BODY"] = request.body
    env["HEADERS"] = "\n".join(f"{k}: {v}" for k, v in request.headers.items())
    script = str(Path(__file__).parent / "load.lua")
    where = f"http://127.0.0.1:{port}{PATH}"
    options = ["-t1", f"-c{request.clients}", f"-d{seconds:g}s", "-s", script]
    done = subprocess.run(["wrk", *options, where], env=env, capture_output=True, text=True)
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT"))
    count, took_us, broken, refused, p50, p99, _ = map(int, line.split()[1:])
    return Load((count - refused) / took_us * 1e6, broken + refused, p50 / 1e3, p99 / 1e3)


@contextmanager
def serving(peer: str, python: str, folder: Path, port: int) -> Iterator[None]:
    """Run a peer's server until the block ends."""
    env = dict(os.environ, PYTHONPATH=str(claims.HERE), BENTOML_DO_NOT_TRACK="1")
    command = [python, "-m", "benchmarks.serving_peers", peer, str(folder), str(port)]
    log = (folder / f"{peer}.log").open("w")
    process = subprocess.Popen(
        command, env=env, stdout=log, stderr=log, start_new_session=True, cwd=claims.HERE
    )
    try:
        wait_for(peer, port, process, folder)
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        log.close()


def wait_for(peer: str, port: int, process: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait until a server answers the first request."""
    first = next(iter(json.loads((folder / "requests.json").read_text()).values()))
    body = Path(first["body"]).read_bytes()
    end = time.monotonic() + UP_S
    while True:
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}{PATH}", data=body, headers=first["headers"]
        )
        try:
            with urllib.request.urlopen(asked, timeout=5) as reply:
                if len(json.load(reply)["outputs"][0]["data"]) == serving_model.CLASSES:
                    return
        except OSError:
            if process.poll() is not None or time.monotonic() > end:
                log = (folder / f"{peer}.log").read_text()[-2000:]
                raise SystemExit(f"{peer} does not answer: {log}") from None
            time.sleep(0.2)


def rounds_of(
    pythons: Mapping[str, str],
    requests: list[Request],
    rounds: int,
    seconds: float,
    folder: Path,
) -> tuple[dict[str, dict[str, list[Load]]], list[claims.Claim]]:
    """Measure everything, interleaved: request name to server to one load a round.

    And what lepton's processes spent, in the last round.
    """
    found: dict[str, dict[str, list[Load]]] = {r.name: {} for r in requests}
    spent: list[claims.Claim] = []
    for number in range(rounds):
        order = [*(p for p in PEERS if p in pythons), AGAIN]
        for peer in order[number % len(order) :] + order[: number % len(order)]:
            server = "fastapi" if peer == AGAIN else peer
            asked = [r for r in requests if not (server in NO_BINARY and "binary" in r.name)]
            port = PORT + PEERS.index(server)  # the former server may still be leaving its own
            with serving(server, pythons[server], folder, port):
                for request in asked:
                    measure(port, request, WARM_S)  # and what it leaves to be logged comes in here
                    load = measure(port, request, seconds)
                    found[request.name].setdefault(peer, []).append(load)
                    told = f"{load.rate:9.0f}/s  p99 {load.p99_ms:.1f} ms"
                    print(f"{request.name:<27} {peer:<15} {told}", flush=True)
                if peer == "lepton" and number == rounds - 1:
                    spent = processes(port, requests, seconds)
    return found, spent


def processes(port: int, requests: list[Request], seconds: float) -> list[claims.Claim]:
    """Return what lepton's processes spend on a request: the router, and the replica."""
    made: list[claims.Claim] = []
    names = {"router, HAProxy's process": b"haproxy", "replica's process": b"ray::ServeReplica"}
    for request in requests:
        measure(port, request, WARM_S)
        before = {n: _cpu_s(begin) for n, begin in names.items()}
        load = measure(port, request, seconds)
        for name, begin in names.items():
            spent = (_cpu_s(begin) - before[name]) / (load.rate * seconds) * 1e6
            made.append(claims.claim(f"{request.name}: {name}", spent, None, "us CPU"))
    return made


def _cpu_s(begin: bytes) -> float:
    """CPU seconds of the processes whose command begins like this."""
    used = 0.0
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes()
            if command.split(b"\0")[0].rsplit(b"/", 1)[-1].startswith(begin):
                fields = (path / "stat").read_text().rsplit(")", 1)[1].split()
                used += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except OSError:
            continue
    return used


def ratio(loads: Mapping[str, list[Load]], peer: str, to: str) -> float | None:
    """Return the median of the rounds' ratios of two servers' rates."""
    if peer not in loads or to not in loads:
        return None
    pairs = zip(loads[peer], loads[to], strict=True)
    return statistics.median(a.rate / b.rate for a, b in pairs)


def state(found: Mapping[str, Mapping[str, list[Load]]], rounds: int) -> list[claims.Claim]:
    """Return the claims."""
    made: list[claims.Claim] = []
    one = found[ONE]
    goals: dict[str, tuple[str, float]] = {
        "fastapi": ("plain FastAPI", 0.60),
        "litserve": ("LitServe", 2.0),
        "ray_serve": ("default Ray Serve", 10.0),
        "bentoml": ("BentoML", 1.0),
    }
    for name in found:
        for peer, (words, least) in goals.items():
            text = f"{name}: lepton's requests a second over {words}'s"
            goal = least if name.startswith(ONE) else 1.0 if "binary" in name else None
            value = ratio(found[name], "lepton", peer)
            made.append(claims.claim(text, value, goal, "times", runs=rounds))
    noise = ratio(one, AGAIN, "fastapi")
    made.append(claims.claim("plain FastAPI against itself", noise, None, "times", runs=rounds))
    for name, loads in found.items():
        mine = loads["lepton"]
        p99 = statistics.median(x.p99_ms for x in mine)
        made.append(claims.claim(f"{name}: lepton's 99th percentile", p99, None, "ms", runs=rounds))
        for peer, theirs in loads.items():
            rate = statistics.median(x.rate for x in theirs)
            made.append(claims.claim(f"{name}: {peer}", rate, None, "requests/s", runs=rounds))
    failed = sum(x.failed for loads in found.values() for x in loads["lepton"])
    made.append(claims.claim("lepton's failed requests", failed, 0, "requests", -1, runs=rounds))
    return made


def plot(found: Mapping[str, Mapping[str, list[Load]]]) -> None:
    """Draw the rates."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    across = len(found) // len(CLIENTS)
    figure, axes = plt.subplots(len(CLIENTS), across, figsize=(4 * across, 2.5 * len(CLIENTS)))
    for axis, (name, loads) in zip(axes.flat, found.items(), strict=True):
        peers = [p for p in loads if p != AGAIN]
        rates = [statistics.median(x.rate for x in loads[p]) for p in peers]
        colors = ["tab:blue" if p == "lepton" else "silver" for p in peers]
        axis.barh(peers, rates, color=colors)
        axis.set_title(name if "clients" in name else f"{name}, {CLIENTS[0]} clients", fontsize=9)
        axis.set_xlabel("requests/s")
    figure.tight_layout()
    figure.savefig(claims.RESULTS / "serving.png", dpi=110)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--python-for", action="append", default=[], metavar="PEER=PATH")
    args = parser.parse_args()
    pythons = dict(p.split("=", 1) for p in args.python_for)
    rounds, seconds = args.rounds or (1 if args.quick else 5), 2.0 if args.quick else 4.0
    if shutil.which("wrk") is None:
        subprocess.run(["apt-get", "install", "-y", "-qq", "wrk"], check=True)
    with tempfile.TemporaryDirectory(prefix="lepserve") as scratch:
        folder = Path(scratch)
        serving_model.make(folder)
        serving_model.save_weights(folder)
        serving_model.describe(folder)
        told: dict[str, Any] = json.loads((folder / "requests.json").read_text())
        requests = [
            Request(
                name if clients == CLIENTS[0] else f"{name}, {clients} clients",
                **what,
                clients=clients,
            )
            for clients in CLIENTS
            for name, what in told.items()
        ]
        here = {p: pythons.get(p, sys.executable) for p in PEERS if usable(p, pythons)}
        found, spent = rounds_of(here, requests, rounds, seconds, folder)
        layers = spent + serving_layers.measure(folder)
    claims.record(state(found, rounds) + layers, "serving")
    plot(found)


def usable(peer: str, pythons: Mapping[str, str]) -> bool:
    """Whether a peer is installed; say so if not."""
    if peer not in ("litserve", "bentoml"):
        return True
    python = pythons.get(peer, sys.executable)
    there = subprocess.run([python, "-c", f"import {peer}"], capture_output=True).returncode == 0
    if not there:
        print(f"{peer} is left out: give --python-for {peer}=PATH of an environment with it")
    return there


if __name__ == "__main__":
    main()
