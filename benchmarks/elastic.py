"""What a lost worker costs: lepton, torchrun and stock Ray Train, interleaved.

``python -m benchmarks.elastic [--quick] [--rounds N]`` kills a worker of each peer in mid-run with
SIGKILL, several times, and reads from the workers' own records when the next new step was made and
how many steps were made again; then how much of its work a peer gets done under one kill per
minute (``--quick``: per 15 s), and what nodes cost that are added, drained and lost. It also
measures what lepton's bookkeeping and its checkpoints cost a step. ``--only`` takes some of kills,
changes and cost. Writes ``results/elastic.json`` and a plot (``--quick``: elastic-quick.json, no
plot). As it is, with three rounds, it takes about an hour; ``--quick`` about ten minutes.
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

from benchmarks import claims, elastic_changes, elastic_cost
from benchmarks.elastic_changes import Cost, Made, steps_in
from benchmarks.elastic_peers import EVERY, WORKERS

PEERS = ("lepton", "torchrun", "ray_train")
START_S, AGAIN_S = 180.0, 60.0
SETTLED_S = 12.0  # a run is killed in its middle, not while it starts
AT = EVERY + EVERY // 2  # half-way between two checkpoints


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


def wait_for(folder: Path, what: Any, limit_s: float, process: Any) -> list[Made] | None:
    """Poll the records until they fulfil a condition."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end and process.poll() is None:
        found = steps_in(folder)
        if what(found):
            return found
        time.sleep(0.05)
    return None


def one_run(peer: str, kills: int, period_s: float) -> tuple[list[Loss], float | None]:
    """Start a peer and kill one of its workers several times.

    Returns:
        what each kill cost, and the peer's goodput under a kill each period, percent.
    """
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
    share: float | None = None

    def kill() -> None:
        last = steps_in(folder)[-WORKERS:]
        with suppress(ProcessLookupError):
            os.kill(max(m.pid for m in last), signal.SIGKILL)

    try:
        for _ in range(kills):
            losses.append(one_kill(folder, process))
            if losses[-1].full is None:
                break
        else:
            lasting = {"period_s": period_s, "periods": 3}
            share = elastic_changes.goodput(folder, process, kill, **lasting)
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
    return losses, share


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


def claims_of(found: dict[str, list[Loss]]) -> list[claims.Claim]:
    """Return what kills cost, each with its goal."""
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
    return made


def goodput_of(shares: dict[str, list[float | None]], period_s: float) -> list[claims.Claim]:
    """Return how much of its work each peer got done under kills."""
    made: list[claims.Claim] = []
    for peer, found in shares.items():
        known = [s for s in found if s is not None]
        goal = 99 if peer == "lepton" and period_s >= 60 else None
        text = f"{peer}: new steps under one kill per {period_s:g} s, of those undisturbed"
        made.append(claims.claim(text, median(known), goal, "%", runs=len(known)))
    return made


def main() -> None:
    """Run everything and write it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one run of one kill a peer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--only", default="kills,changes,cost")
    given = parser.parse_args()
    peers, only = given.peers.split(","), given.only.split(",")
    rounds, kills, period_s = (1, 1, 15.0) if given.quick else (given.rounds, given.kills, 60.0)
    found: dict[str, list[Loss]] = {p: [] for p in peers}
    shares: dict[str, list[float | None]] = {p: [] for p in peers}
    changes: dict[str, list[dict[str, Cost]]] = {p: [] for p in peers}
    for _ in range(rounds):
        for peer in peers if "kills" in only else []:
            losses, share = one_run(peer, kills, period_s)
            found[peer].extend(losses)
            shares[peer].append(share)
            print(peer, losses, share, file=sys.stderr)
        for peer in peers if "changes" in only else []:
            changes[peer].append(elastic_changes.one_site(peer, quick=given.quick))
            print(peer, changes[peer][-1], file=sys.stderr)
    made: list[claims.Claim] = []
    if "kills" in only:
        made += claims_of(found) + goodput_of(shares, period_s)
    if "changes" in only:
        made += elastic_changes.claims_of(changes)
    if "cost" in only:
        made += elastic_cost.claims_of(elastic_cost.measure(quick=given.quick))
    claims.record(made, "elastic-quick" if given.quick else "elastic")
    if not given.quick:
        plot(found, changes)


def pauses_of(
    found: dict[str, list[Loss]], changes: dict[str, list[dict[str, Cost]]]
) -> dict[str, dict[str, list[float]]]:
    """Return the seconds without a new step, by what happened and by peer."""
    pauses = {
        "worker killed": {
            p: [x.seconds for x in losses if x.seconds is not None] for p, losses in found.items()
        }
    }
    for change, words in elastic_changes.WORDS.items():
        pauses[words] = {
            peer: [
                cost.pause
                for run in runs
                for name, cost in run.items()
                if name.split()[0] == change and cost.pause is not None
            ]
            for peer, runs in changes.items()
        }
    return pauses


def plot(found: dict[str, list[Loss]], changes: dict[str, list[dict[str, Cost]]]) -> None:
    """Draw each peer's pauses, where matplotlib is installed (the ``bench`` extra)."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return

    mpl.use("Agg")
    from matplotlib import pyplot

    pauses = pauses_of(found, changes)
    figure, panels = pyplot.subplots(len(pauses), 1, figsize=(6, 1.6 * len(pauses)), sharex=True)
    for axes, (what, by_peer) in zip(panels, pauses.items(), strict=True):
        for place, values in enumerate(by_peer.values()):
            axes.plot(values, [place] * len(values), "o", alpha=0.6)
        axes.set_yticks(range(len(by_peer)), list(by_peer))
        axes.set_ylim(-0.6, len(by_peer) - 0.4)
        axes.set_title(what, fontsize="medium", loc="left")
        axes.set_xscale("log")
    panels[-1].set_xlabel("seconds without a new step")
    figure.tight_layout()
    figure.savefig(claims.RESULTS / "elastic.png", dpi=110)


if __name__ == "__main__":
    main()
