"""What a lost worker costs: lepton, torchrun and stock Ray Train, interleaved.

``python -m benchmarks.elastic [--quick] [--rounds N]`` kills a worker of each peer in mid-run with
SIGKILL, several times, and reads from the workers' own records when the next new step was made and
how many steps were made again. It also measures what lepton's bookkeeping and its checkpoints cost
a step. Writes ``results/elastic.json`` and a plot.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import claims, elastic_cost
from benchmarks.elastic_peers import EVERY, WORKERS

PEERS = ("lepton", "torchrun", "ray_train")
START_S, AGAIN_S = 180.0, 60.0
SETTLED_S = 12.0  # a run is killed in its middle, not while it starts
AT = EVERY + EVERY // 2  # half-way between two checkpoints


@dataclass(frozen=True)
class Made:
    """A step that a process saw made."""

    step: int
    time_ns: int
    pid: int


@dataclass(frozen=True)
class Loss:
    """What one kill cost.

    Attributes:
        seconds: from the kill to the next new step; None if none was made within a minute.
        again: steps that were made once more.
        full: seconds until all workers took part again; None likewise.
    """

    seconds: float | None
    again: int
    full: float | None


def steps_in(folder: Path) -> list[Made]:
    """Return what all ranks recorded, by time."""
    found = [
        Made(*map(int, line.split()))
        for path in folder.glob("*.steps")
        for line in path.read_text().split("\n")[:-1]
    ]
    return sorted(found, key=lambda m: m.time_ns)


def wait_for(folder: Path, what: Any, limit_s: float, process: Any) -> list[Made] | None:
    """Poll the records until they fulfil a condition."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end and process.poll() is None:
        found = steps_in(folder)
        if what(found):
            return found
        time.sleep(0.05)
    return None


def one_run(peer: str, kills: int) -> list[Loss]:
    """Start a peer, kill one of its workers several times, and say what that cost."""
    folder = Path(tempfile.mkdtemp(prefix="lepton-elastic-"))
    log = (folder / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.elastic_peers", peer, str(folder)],
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, "LEPTON_HOME": str(folder)},
    )
    losses: list[Loss] = []
    try:
        for _ in range(kills):
            losses.append(one_kill(folder, process))
            if losses[-1].full is None:
                break
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        for pid in {m.pid for m in steps_in(folder)}:  # torchrun leaves hung workers behind
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)
    return losses


def one_kill(folder: Path, process: Any) -> Loss:
    """Wait until all workers train, between two checkpoints; kill one; read what it cost."""
    since = time.time_ns()

    def trains(found: list[Made]) -> bool:
        if not found:
            return False
        last = found[-1].step
        lately = {m.pid for m in found if m.step >= last - 1}
        whole = [m.time_ns for m in found if m.pid in lately]
        settled = time.time_ns() - max(min(t for t in whole), since) > SETTLED_S * 1e9
        return len(lately) >= WORKERS and last % EVERY >= AT % EVERY and settled

    before = wait_for(folder, trains, START_S, process)
    if before is None:
        raise RuntimeError("the peer did not get to train with all its workers")
    last = before[-1].step
    victim = max(m.pid for m in before if m.step >= last - 1)
    killed = time.time_ns()
    os.kill(victim, signal.SIGKILL)
    reached = max(m.step for m in steps_in(folder) if m.pid == victim)
    # the step after the victim's last may be one that it had given its part to
    again = wait_for(folder, lambda f: f[-1].step > reached + 1, AGAIN_S, process)
    if again is None:
        return Loss(None, 0, None)
    first = min(m.time_ns for m in again if m.step > reached + 1)
    known = {(m.pid, m.step) for m in again if m.time_ns <= killed}
    old = {pid for pid, _ in known}
    repeated = {
        m.step
        for m in again
        if m.time_ns > killed
        and m.step <= reached
        and (m.pid not in old or (m.pid, m.step) in known)
    }
    lost = len(repeated)

    def by_step(found: list[Made]) -> dict[int, list[Made]]:
        steps: dict[int, list[Made]] = {}
        for m in found:
            if m.step > reached + 1 and m.time_ns > killed:
                steps.setdefault(m.step, []).append(m)
        return {s: made for s, made in steps.items() if len({m.pid for m in made}) >= WORKERS}

    after = wait_for(folder, by_step, AGAIN_S, process)
    full = None
    if after is not None:
        made = by_step(after)
        full = (max(m.time_ns for m in made[min(made)]) - killed) / 1e9
    return Loss((first - killed) / 1e9, lost, full)


def median(values: list[float]) -> float | None:
    """Return the median, or None of nothing."""
    return statistics.median(values) if values else None


def claims_of(found: dict[str, list[Loss]], cost: dict[str, Any]) -> list[claims.Claim]:
    """Return what was measured, each with its goal."""
    seconds = {
        p: median([x.seconds for x in ls if x.seconds is not None]) for p, ls in found.items()
    }
    again = {
        p: median([float(x.again) for x in ls if x.seconds is not None]) for p, ls in found.items()
    }
    full = {p: median([x.full for x in ls if x.full is not None]) for p, ls in found.items()}
    hung = {p: sum(x.seconds is None for x in ls) for p, ls in found.items()}
    runs = {p: len(ls) for p, ls in found.items()}
    goal = {"lepton": 0.5}
    made: list[claims.Claim] = []
    for peer in found:
        text = f"{peer}: worker killed, seconds to the next new step"
        made.append(claims.claim(text, seconds[peer], goal.get(peer), "s", -1, runs=runs[peer]))
        text = f"{peer}: worker killed, steps made again"
        none = 0 if peer == "lepton" else None
        made.append(claims.claim(text, again[peer], none, "steps", -1, runs=runs[peer]))
        text = f"{peer}: worker killed, seconds until all workers take part"
        whole = 3 if peer == "lepton" else None
        made.append(claims.claim(text, full[peer], whole, "s", -1, runs=runs[peer]))
        text = f"{peer}: kills after which nothing went on for a minute"
        made.append(claims.claim(text, float(hung[peer]), none, "kills", -1, runs=runs[peer]))
    ours, theirs = seconds.get("lepton"), seconds.get("torchrun")
    ratio = ours / theirs if ours is not None and theirs else None
    made.append(claims.claim("lepton to torchrun, seconds to the next step", ratio, 0.25, "x", -1))
    goodput = None if ours is None else 100 * (1 - ours / 60)
    text = "lepton: share of a minute that one killed worker leaves"
    made.append(claims.claim(text, goodput, 99, "%"))
    made.extend(elastic_cost.claims_of(cost))
    return made


def main() -> None:
    """Run everything and write it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one run of one kill a peer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--peers", default=",".join(PEERS))
    given = parser.parse_args()
    rounds, kills = (1, 1) if given.quick else (given.rounds, given.kills)
    found: dict[str, list[Loss]] = {p: [] for p in given.peers.split(",")}
    for _ in range(rounds):
        for peer, losses in found.items():
            losses.extend(one_run(peer, kills))
            print(peer, losses[-kills:], file=sys.stderr)
    cost = elastic_cost.measure(quick=given.quick)
    claims.record(claims_of(found, cost), "elastic")
    if not given.quick:
        plot(found)


def plot(found: dict[str, list[Loss]]) -> None:
    """Draw each peer's pauses, where matplotlib is installed (the ``bench`` extra)."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 2.6))
    for place, (_, losses) in enumerate(found.items()):
        values = [x.seconds for x in losses if x.seconds is not None]
        axes.plot(values, [place] * len(values), "o", alpha=0.6)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_xscale("log")
    axes.set_xlabel("seconds from SIGKILL of a worker to the next new step")
    figure.tight_layout()
    figure.savefig(claims.RESULTS / "elastic.png", dpi=110)


if __name__ == "__main__":
    main()
