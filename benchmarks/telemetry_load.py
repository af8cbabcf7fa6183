"""Requests a second of a replica under load, with telemetry and without, by turns.

Two processes that do the same differ by some percent, and a machine's speed changes by more within
a second. So one process has three replicas of a model, and only the first one has telemetry;
``wrk`` asks them by turns of :data:`TURN_S` in changing order, without a pause. How far the other
two differ is the noise. Which of three like replicas is the quickest differs from process to
process; so several are measured, each of which makes its replicas in another order, and the
standard error is of the processes. Such turns show what a request itself does for telemetry. What
its threads do later falls into anybody's turn; so processes with the first replica alone are kept
busy, and what the kernel counts for those threads, beyond what it does with telemetry off, is added
as if every moment of theirs were one that the replica has not. No inference log is written: its
thread would be the largest noise of all.
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
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

from benchmarks import claims
from benchmarks.telemetry_once import SAMPLED, question, telemetry_threads

TURN_S = 0.1
CONNECTIONS, WARM = 8, 10
"""Cycles that do not count: the first ones of a process."""
ALONE_S = 8
ARMS = ("m", "off", "control")
"""Models; the first one has telemetry."""

THREADS = "/threads"
"""Where the process tells what telemetry's threads have used."""

Rates = dict[str, float]
"""Requests a second of each arm of one process."""


class Load(NamedTuple):
    """What processes answered by turns, and others with one replica.

    Attributes:
        rates: of each of the former.
        threads: processors that telemetry's threads took of each of the latter.
    """

    rates: list[Rates]
    threads: list[float]


def serve(folder: str, *arms: str) -> None:
    """Serve models of a folder until killed; print the port first."""
    import uvicorn
    from starlette.responses import JSONResponse

    from lepton import telemetry
    from lepton.serving.replica import Replica
    from lepton.serving.shortcut import Shortcut

    apps: dict[str, Any] = {}
    telemetry.measuring()  # whether the process measures is settled when it is first asked
    asked = os.environ.get("OTEL_SDK_DISABLED", "")
    for name in arms:
        os.environ["OTEL_SDK_DISABLED"] = asked if name == ARMS[0] else "true"
        replica: Any = Replica(name, folder)
        apps[name] = replica.__serve_build_asgi_app__()
        replica._answers.add = lambda _: None
        if name != ARMS[0]:
            replica._batcher._told = replica._spans._told = None  # else it would measure, too
    os.environ["OTEL_SDK_DISABLED"] = asked

    async def chosen(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await apps[ARMS[0]](scope, receive, send)
            return
        if scope["path"] == THREADS:
            await JSONResponse(telemetry_threads())(scope, receive, send)
            return
        name = scope["path"].split("/")[1]
        await apps[name]({**scope, "root_path": f"/{name}"}, receive, send)

    config = uvicorn.Config(Shortcut(chosen), access_log=False, log_level="error", lifespan="off")
    listening = socket.create_server(("127.0.0.1", 0))
    print(listening.getsockname()[1], flush=True)
    uvicorn.Server(config).run(sockets=[listening])


def measure(
    folder: str, settings: Mapping[str, Mapping[str, str]], processes: int, cycles: int
) -> dict[str, Load]:
    """Return what was answered under each setting; nothing without ``wrk``.

    Args:
        folder: with the models.
        settings: environments; the one called off is not asked by turns.
        processes: of each setting.
        cycles: of turns, in each process.

    Raises:
        RuntimeError: a request failed.
    """
    import pyarrow as pa

    if shutil.which("wrk") is None:
        print("wrk is missing (apt-get install wrk): no load is measured", file=sys.stderr)
        return {}
    body = Path(folder, "question")
    body.write_bytes(question(pa))
    found = {name: Load([], []) for name in settings}
    chance = random.Random(0)
    for _ in range(processes):
        for name, environment in settings.items():
            rates, threads = found[name]
            if name != "off":
                with _serving(folder, environment, chance.sample(ARMS, len(ARMS))) as port:
                    rates.append(_rates(port, body, cycles))
                print("load", name, rates[-1], file=sys.stderr)
            with _serving(folder, environment, ARMS[:1]) as port:
                threads.append(_threads(port, body))
    print("threads", {name: load.threads for name, load in found.items()}, file=sys.stderr)
    return found


def claims_of(
    found: Mapping[str, Load], names: Mapping[str, str], goal: float
) -> list[claims.Claim]:
    """Return what each setting costs beside the two that are off; ``names`` says what each is."""
    made: list[claims.Claim] = []
    every = [rates for load in found.values() for rates in load.rates]
    if not every:
        return made
    on, *off = ARMS
    rate = statistics.fmean(rates[arm] for rates in every for arm in off)
    made.append(
        claims.claim("requests/s under load, telemetry off", rate, None, "1/s", runs=len(every))
    )
    for name, load in found.items():
        if not load.rates:
            continue
        title = f"requests/s lost under load: {names[name]}"
        inline, inline_error = _mean([_lost(one, on, off) for one in load.rates])
        late, late_error = _mean([100 * share for share in load.threads])
        without, without_error = _mean([100 * share for share in found["off"].threads])
        error = math.hypot(inline_error, late_error, without_error)
        runs = len(load.rates)
        made += [
            claims.claim(title, inline + late - without, goal, "%", -1, runs=runs),
            claims.claim(f"{title}: standard error", error, None, "%", -1, runs=runs),
            claims.claim(
                f"{title}: of that, its threads", late - without, None, "%", -1, runs=runs
            ),
        ]
    title = f"requests/s lost under load: {names['control']}"
    noise, error = _mean([_lost(one, off[1], off[:1]) for one in every])
    made.append(claims.claim(title, noise, None, "%", -1, runs=len(every)))
    title = f"{title}: standard error"
    return [*made, claims.claim(title, error, None, "%", -1, runs=len(every))]


def _lost(rates: Rates, arm: str, others: Sequence[str]) -> float:
    """Return how many percent less one arm answered than others."""
    return 100 * (1 - rates[arm] / statistics.fmean(rates[other] for other in others))


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error; of one value that is not known."""
    several = len(values) > 1
    error = statistics.stdev(values) / math.sqrt(len(values)) if several else math.nan
    return statistics.fmean(values), error


@contextmanager
def _serving(folder: str, given: Mapping[str, str], arms: Sequence[str]) -> Generator[int]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "RAY_ADDRESS"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.telemetry_once", "server", folder, *arms],
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


def _rates(port: int, body: Path, cycles: int) -> Rates:
    chance = random.Random(0)
    orders = [chance.sample(ARMS, len(ARMS)) for _ in range(cycles + WARM)]
    turns = [arm for order in orders for arm in order]
    counts = _asked(port, body, turns, TURN_S)
    found = dict.fromkeys(ARMS, 0)
    for at, order in enumerate(orders):
        if at >= WARM:
            for arm, count in zip(order, counts[at * len(ARMS) :], strict=False):
                found[arm] += count
    return {arm: count / (cycles * TURN_S) for arm, count in found.items()}


def _threads(port: int, body: Path) -> float:
    """Keep one replica busy; return how much of a processor telemetry's threads take meanwhile."""
    _asked(port, body, ARMS[:1], WARM * TURN_S)
    before = _threads_s(port)
    _asked(port, body, ARMS[:1], ALONE_S)
    return (_threads_s(port) - before) / ALONE_S


def _asked(port: int, body: Path, turns: Sequence[str], turn_s: float) -> list[int]:
    """Return how many requests went out in each turn."""
    told = {
        "BODY": str(body),
        "HEADERS": f"content-type: application/json\ntraceparent: {SAMPLED}",
        "PATHS": " ".join(f"/{arm}/v2/models/{arm}/infer" for arm in turns),
        "TURN_S": str(turn_s),
    }
    script = str(Path(__file__).parent / "turns.lua")
    options = ["-t1", f"-c{CONNECTIONS}", f"-d{math.ceil(len(turns) * turn_s)}s", "-s", script]
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
    return list(map(int, said["TURNS"].split()))


def _threads_s(port: int) -> float:
    """CPU seconds of a process's telemetry threads so far, when what waits was written."""
    time.sleep(1)
    with urlopen(f"http://127.0.0.1:{port}{THREADS}", timeout=30) as answer:
        return float(answer.read())
