"""What a change of nodes costs: two added, two drained, two lost.

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
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import claims
from benchmarks.elastic_records import Made, Records, wait_for
from benchmarks.elastic_sites import EACH, MOST

CHANGES = (("add", MOST), ("drain", EACH), ("add again", MOST), ("lose", EACH))
"""What is done to a run of two workers, and how many are to train after it."""
WORDS = {
    "add": "resized from 2 to 4 workers",
    "drain": "two workers told to go",
    "lose": "a node of two workers lost",
}


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


def one_site(
    peer: str, found: dict[str, Cost], *, steady_s: float = 5.0, limit_s: float = 100.0
) -> None:
    """Put a peer through all changes; what each cost goes into ``found`` at once.

    Raises:
        RuntimeError: it did not come to train with as many workers as it should.
    """
    folder = Path(tempfile.mkdtemp(prefix="lepton-sites-"))
    records = Records(folder)
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
    try:
        size = EACH
        for change, after in CHANGES:

            def steady(size: int = size) -> bool:
                lately = records.since(time.time_ns() - int((steady_s + 2) * 1e9))
                return settled(lately, size, steady_s)

            if not wait_for(steady, limit_s, process):
                raise RuntimeError(f"{size} workers did not get to train within {limit_s:g} s")
            found[change] = _change(records, process, change.split()[0], after, limit_s)
            size = after
    finally:
        _end(process, records, folder)


def _change(records: Records, process: Any, word: str, after: int, limit_s: float) -> Cost:
    since = time.time_ns()
    process.stdin.write(f"{word}\n")
    process.stdin.flush()

    def over() -> Cost | None:
        cost = cost_of(records.since(since), since, after)
        return cost if cost.full is not None else None

    wait_for(over, limit_s, process)
    time.sleep(2)  # what comes right after belongs to it
    return cost_of(records.since(since), since, after, time.time_ns())


def _end(process: Any, records: Records, folder: Path) -> None:
    with suppress(OSError):
        process.stdin.close()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    records.kill_all()
    shutil.rmtree(folder, ignore_errors=True)


def claims_of(found: dict[str, dict[str, Cost]]) -> list[claims.Claim]:
    """Return what was measured."""
    made: list[claims.Claim] = []
    for change, words in WORDS.items():
        for peer, run in found.items():
            costs = [cost for name, cost in run.items() if name.split()[0] == change]
            if not costs:
                continue
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
