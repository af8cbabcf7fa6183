"""Ways that are timed in turn, so that what slows the machine down slows all of them down."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from benchmarks.claims import Claim


def in_turn(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Time each way once a round, beginning with another each time; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(rounds + 1):
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            started = time.perf_counter()
            ways[name]()
            if turn:
                times[name].append(time.perf_counter() - started)
    return times


def ratio(top: list[float], bottom: list[float]) -> float:
    """Return the median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(top, bottom, strict=True))


def with_rounds(claims: list[Claim], rounds: int) -> list[Claim]:
    """Return claims that say how many rounds they rest on."""
    return [{**one, "runs": rounds} for one in claims]
