"""What a change of nodes costs: two added, two drained, two lost; and goodput under kills.

Read from the workers' own records of steps (:mod:`benchmarks.elastic_peers`), alike for all peers.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import claims
from benchmarks.elastic_sites import EACH, MOST

T = TypeVar("T")

CHANGES = (("add", MOST), ("drain", EACH), ("add again", MOST), ("lose", EACH))
"""What is done to a run of two workers, and how many are to train after it."""
WORDS = {
    "add": "resized from 2 to 4 workers",
    "drain": "two workers told to go",
    "lose": "a node of two workers lost",
}


@dataclass(frozen=True)
class Made:
    """A step that a process saw made."""

    step: int
    time_ns: int
    pid: int


@dataclass(frozen=True)
class Cost:
    """What a change cost.

    Attributes:
        pause: longest time without a new step after it, seconds; None: no step came any more.
        again: steps that were made once more.
        full: seconds until as many workers trained as should; None: it did not come to that.
    """

    pause: float | None
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


def cost_of(records: Sequence[Made], since_ns: int, size: int, until_ns: int = 0) -> Cost:
    """Work out what a change cost; ``until_ns`` is when it was looked at last. Pure.

    Ranks make a step together, so who records one that lies two behind the furthest has gone back
    to it, and all that came after it are made again.
    """
    reached = max((m.step for m in records if m.time_ns <= since_ns), default=0)
    firsts: dict[int, int] = {}
    by_step: dict[int, set[int]] = {}
    furthest, again, full = reached, set[int](), None
    for m in records:
        if m.time_ns <= since_ns:
            continue
        if m.step <= furthest - 2:
            again.update(range(m.step, furthest + 1))
        furthest = max(furthest, m.step)
        if m.step > reached:
            firsts.setdefault(m.step, m.time_ns)
            by_step.setdefault(m.step, set()).add(m.pid)
    settled = [s for s, pids in by_step.items() if len(pids) == size and s + 3 <= furthest]
    if settled:
        full = (firsts[min(settled)] - since_ns) / 1e9
    times = [since_ns, *sorted(firsts.values())]
    if firsts and full is None and until_ns:
        times.append(until_ns)  # it stands still
    gaps = [b - a for a, b in pairwise(times)]
    return Cost(max(gaps) / 1e9 if gaps else None, len(again), full)


def settled(records: Sequence[Made], size: int, for_s: float) -> bool:
    """Whether exactly so many workers have trained lately, for so long."""
    now = time.time_ns()
    lately = [m for m in records if now - m.time_ns < for_s * 1e9]
    before = any(now - m.time_ns >= for_s * 1e9 for m in records)
    steps: dict[int, set[int]] = {}
    for m in lately:
        steps.setdefault(m.step, set()).add(m.pid)
    whole = sorted(steps)[1:-2]  # those at the edges may be recorded in part
    return before and len(whole) >= 3 and all(len(steps[s]) == size for s in whole)


def wait_for(look: Callable[[], T | None], limit_s: float, process: Any) -> T | None:
    """Poll until there is something, as long as the process lives."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end and process.poll() is None:
        if (found := look()) is not None and found is not False:
            return found
        time.sleep(0.1)
    return None


def one_site(peer: str, *, quick: bool) -> dict[str, Cost]:
    """Put a peer through all changes; those that it does not come to are missing."""
    steady_s, limit_s = (4.0, 90.0) if quick else (10.0, 180.0)
    folder = Path(tempfile.mkdtemp(prefix="lepton-sites-"))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.elastic_sites", peer, str(folder)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "LEPTON_HOME": str(folder)},
            text=True,
        )
    found: dict[str, Cost] = {}
    try:
        size = EACH
        for change, after in CHANGES:
            ready = wait_for(
                lambda s=size: settled(steps_in(folder), s, steady_s), limit_s, process
            )
            if ready is None:
                print(f"{peer}: {size} workers did not get to train steadily", file=sys.stderr)
                break
            found[change] = _change(folder, process, change.split()[0], after, limit_s)
            size = after
    finally:
        _end(process, folder)
    return found


def _change(folder: Path, process: Any, word: str, after: int, limit_s: float) -> Cost:
    since = time.time_ns()
    process.stdin.write(f"{word}\n")
    process.stdin.flush()

    def over() -> Cost | None:
        cost = cost_of(steps_in(folder), since, after)
        return cost if cost.full is not None else None

    wait_for(over, limit_s, process)
    time.sleep(2)  # what comes right after belongs to it
    return cost_of(steps_in(folder), since, after, time.time_ns())


def _end(process: Any, folder: Path) -> None:
    with suppress(OSError):
        process.stdin.close()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    for pid in {m.pid for m in steps_in(folder)}:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def goodput(
    folder: Path, process: Any, kill: Callable[[], None], *, period_s: float, periods: int
) -> float | None:
    """Return new steps under one kill per period as a share of what comes undisturbed, percent.

    Undisturbed is half a period before the kills and half a one after them, together: on a machine
    that has other things to do, too, neither alone says much.

    Args:
        folder: with the records.
        process: the peer, which trains with all its workers.
        kill: ends one worker.
        period_s: seconds from one kill to the next.
        periods: how many.
    """
    undisturbed = _made_in(folder, period_s / 2)
    began = time.time_ns()
    for _ in range(periods):
        kill()
        time.sleep(period_s)
        if process.poll() is not None:
            return None
    made = _furthest(folder, time.time_ns()) - _furthest(folder, began)
    undisturbed += _made_in(folder, period_s / 2)
    return 100 * made / (undisturbed * periods) if undisturbed > 0 else None


def _made_in(folder: Path, seconds: float) -> int:
    """Wait, and return how many new steps were made meanwhile."""
    since = time.time_ns()
    time.sleep(seconds)
    return _furthest(folder, time.time_ns()) - _furthest(folder, since)


def _furthest(folder: Path, until_ns: int) -> int:
    return max((m.step for m in steps_in(folder) if m.time_ns <= until_ns), default=0)


def claims_of(found: dict[str, list[dict[str, Cost]]]) -> list[claims.Claim]:
    """Return what was measured."""
    made: list[claims.Claim] = []
    for change, words in WORDS.items():
        for peer, runs in found.items():
            costs = [run[c] for run in runs for c in run if c.split()[0] == change]
            goals = {"lose": 5.0} if peer == "lepton" else {}
            none = 0 if peer == "lepton" else None
            for text, values, goal, unit in (
                (
                    "longest time without a new step",
                    [c.pause for c in costs],
                    goals.get(change),
                    "s",
                ),
                ("steps made again", [float(c.again) for c in costs], none, "steps"),
                ("until as many train as should", [c.full for c in costs], None, "s"),
            ):
                known = sorted(v for v in values if v is not None)
                middle = known[len(known) // 2] if known else None
                text = f"{peer}: {words}, {text}"
                made.append(claims.claim(text, middle, goal, unit, -1, runs=len(known)))
    return made
