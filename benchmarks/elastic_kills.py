"""What a killed worker costs, and how much work gets done under kills.

Read from the workers' own records of steps (:mod:`benchmarks.elastic_peers`), alike for all peers.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import claims
from benchmarks.elastic_changes import Cost, cost_of, settled
from benchmarks.elastic_peers import EVERY, WORKERS
from benchmarks.elastic_records import Records, wait_for

START_S, AGAIN_S = 180.0, 30.0
SETTLED_S = 8.0  # a run is killed in its middle, not while it starts
MINUTE_S = 60.0
PARTS = 4  # of a period, in which new steps are counted undisturbed, twice


@dataclass(frozen=True)
class Loss:
    """What one kill cost, and how long a step took before it, seconds."""

    cost: Cost
    step_s: float


@dataclass(frozen=True)
class Goodput:
    """What was done under kills.

    Attributes:
        period_s: from one kill to the next, seconds.
        made: new steps, percent of those undisturbed.
        going: time in which new steps came, percent: what is left without the pauses of the kills.
    """

    period_s: float
    made: float
    going: float


@contextmanager
def peer_at_work(peer: str) -> Generator[tuple[Records, Any]]:
    """Start a peer; end it, and all that it left behind."""
    folder = Path(tempfile.mkdtemp(prefix="lepton-elastic-"))
    records = Records(folder)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.elastic_peers", peer, str(folder)],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "LEPTON_HOME": str(folder)},
        )
    try:
        yield records, process
    except RuntimeError as e:
        raise RuntimeError(f"{e}; it said last: {_last_words(folder / 'log')}") from e
    finally:
        end(process, signal.SIGINT)
        records.kill_all()
        shutil.rmtree(folder, ignore_errors=True)


def end(process: Any, by: signal.Signals) -> None:
    """End a process and its group, by force if it does not."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, by)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_words(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-3:])[-400:]


def kills(peer: str, count: int) -> list[Loss]:
    """Kill one of a peer's workers so many times; stop where it does not come back.

    Raises:
        RuntimeError: it did not get to train with all its workers.
    """
    found: list[Loss] = []
    with peer_at_work(peer) as (records, process):
        while len(found) < count:
            found.append(one_kill(records, process))
            if found[-1].cost.full is None:
                break
    return found


def one_kill(records: Records, process: Any) -> Loss:
    """Wait until all workers train, between two checkpoints; kill one; read what it cost."""
    settle(records, process)
    before = records.since(time.time_ns() - 4 * 10**9)
    firsts = {m.step: m.time_ns for m in reversed(before)}
    gaps = [b - a for a, b in pairwise(sorted(firsts.values()))]
    killed = time.time_ns()
    os.kill(max(m.pid for m in before[-WORKERS:]), signal.SIGKILL)
    return Loss(_cost(records, process, killed), statistics.median(gaps) / 1e9)


def settle(records: Records, process: Any) -> None:
    """Wait until all workers train, half-way between two checkpoints."""

    def trains() -> bool:
        made = records.since(time.time_ns() - int((SETTLED_S + 2) * 1e9))
        between = bool(made) and made[-1].step % EVERY >= EVERY // 2
        return between and settled(made, WORKERS, SETTLED_S)

    if not wait_for(trains, START_S, process):
        raise RuntimeError(f"{WORKERS} workers did not get to train within {START_S:g} s")


def _cost(records: Records, process: Any, killed: int) -> Cost:
    def over() -> Cost | None:
        cost = cost_of(records.since(killed), killed, WORKERS)
        return cost if cost.full is not None else None

    found = wait_for(over, AGAIN_S, process)
    return found or cost_of(records.since(killed), killed, WORKERS, time.time_ns())


def goodput(peer: str, period_s: float, periods: int) -> Goodput:
    """Let a peer train under one kill per period.

    Undisturbed is a part of a period before the kills and one after them: on a machine that has
    other things to do, too, neither alone says much.

    Raises:
        RuntimeError: it did not come to that, or ended.
    """
    with peer_at_work(peer) as (records, process):
        settle(records, process)
        undisturbed = _made_in(records, period_s / PARTS)
        began, pauses = time.time_ns(), 0.0
        for k in range(periods):
            killed = time.time_ns()
            last = records.since(killed - 10**9)[-WORKERS:]
            os.kill(max(m.pid for m in last), signal.SIGKILL)
            until = (began + int((k + 1) * period_s * 1e9) - time.time_ns()) / 1e9
            time.sleep(max(0.0, until))
            if process.poll() is not None:
                raise RuntimeError(f"it ended at kill {k + 1}")
            cost = cost_of(records.since(killed), killed, WORKERS)
            pauses += period_s if cost.pause is None else cost.pause
        made = records.furthest(time.time_ns()) - records.furthest(began)
        undisturbed += _made_in(records, period_s / PARTS)
    if not undisturbed:
        raise RuntimeError("it made no step undisturbed")
    done = 100 * made / (undisturbed * PARTS / 2 * periods)
    return Goodput(period_s, done, 100 * (1 - pauses / (periods * period_s)))


def _made_in(records: Records, seconds: float) -> int:
    """Wait, and return how many new steps were made meanwhile."""
    since = time.time_ns()
    time.sleep(seconds)
    return records.furthest(time.time_ns()) - records.furthest(since)


def median(values: Iterable[float | None]) -> float | None:
    """Return the median of what is known, or None of nothing."""
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def claims_of(found: dict[str, list[Loss]]) -> list[claims.Claim]:
    """Return what kills cost, each with its goal."""
    made: list[claims.Claim] = []
    pauses = {p: median(x.cost.pause for x in ls) for p, ls in found.items()}
    for peer, losses in found.items():
        if not losses:
            continue  # it failed: none of this was measured
        back = [x for x in losses if x.cost.full is not None]
        ours = peer == "lepton"
        told: list[tuple[str, float | None, float | None, str]] = [
            ("longest time without a new step", pauses[peer], 0.5 if ours else None, "s"),
            (
                "steps made again",
                median(float(x.cost.again) for x in back),
                0 if ours else None,
                "steps",
            ),
            (
                "seconds until all workers take part",
                median(x.cost.full for x in back),
                3 if ours else None,
                "s",
            ),
            (
                f"not all took part within {AGAIN_S:g} s",
                float(len(losses) - len(back)),
                0 if ours else None,
                "kills",
            ),
        ]
        made += [
            claims.claim(f"{peer}: worker killed, {what}", value, goal, unit, -1, runs=len(losses))
            for what, value, goal, unit in told
        ]
    ours, theirs = pauses.get("lepton"), pauses.get("torchrun")
    if ours is not None and theirs:
        text = "lepton to torchrun, time without a new step"
        made.append(claims.claim(text, ours / theirs, 0.25, "x", -1))
    return made + [c for peer, losses in found.items() for c in _worked_out(peer, losses)]


def _worked_out(peer: str, losses: list[Loss]) -> list[claims.Claim]:
    """What one kill a minute would leave, if each cost what those here did."""
    shares = [
        100 * (1 - (x.cost.pause + x.cost.again * x.step_s) / MINUTE_S)
        for x in losses
        if x.cost.pause is not None
    ]
    text = f"{peer}: goodput at one kill per 60 s, worked out from what a kill costs"
    return [claims.claim(text, median(shares), None, "%", runs=len(shares))] if shares else []


def goodput_claims(found: dict[str, Goodput]) -> list[claims.Claim]:
    """Return how much of its work each peer got done under kills."""
    made: list[claims.Claim] = []
    for peer, got in found.items():
        goal = 99 if peer == "lepton" and got.period_s >= MINUTE_S else None
        under = f"under one kill per {got.period_s:g} s"
        text = f"{peer}: time in which new steps came {under}"
        made.append(claims.claim(text, got.going, goal, "%"))
        text = f"{peer}: new steps {under}, of those undisturbed"
        made.append(claims.claim(text, got.made, goal, "%"))
    return made
