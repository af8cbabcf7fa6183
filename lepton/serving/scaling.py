"""How many replicas: by the requests under way, and by how busy the replicas are.

Requests that are answered at once are never under way for long enough to be counted, so a replica
full of them looks idle by Ray Serve's own measure. It tells how much of the time its event loop
ran or wanted to run (:class:`Busy`), and :func:`replicas_for` takes the larger of both demands.
Serve itself applies its delays and bounds to what is returned here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

BUSY, ANSWERED, WISHED = "busy", "answered", "wished"
IDLE = 0.1
"""Below this share a thread is busy with nothing but itself."""
FULL = 0.7
"""From which share of the time on a replica has enough to do."""


def wanted(
    ongoing: float, busy: Iterable[float], answered: float, target: float, wished: float = 0
) -> int:
    """Return the number of replicas for a demand. Pure.

    Args:
        ongoing: requests under way, in all replicas.
        busy: of each replica, the share of the time that it is busy, from 0 to 1.
        answered: requests that were answered at once of late; one replica stays for them.
        target: requests under way that one replica should have.
        wished: replicas that a promotion needs, to replace one while another answers.
    """
    full = sum(share for share in busy if share > IDLE) / FULL
    return max(math.ceil(ongoing / target), math.ceil(full), int(answered > 0), int(wished))


def replicas_for(context: Any) -> tuple[int, dict[str, Any]]:
    """Return the number of replicas and no state: a policy function of Ray Serve."""
    told: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
    busy, answered = told.get(BUSY, {}).values(), sum(told.get(ANSWERED, {}).values())
    target = context.config.get_target_ongoing_requests()
    wished = max(told.get(WISHED, {}).values(), default=0)
    return wanted(context.total_num_requests, busy, answered, target, wished), {}


def wanted_s() -> float:
    """Return the seconds that this thread ran or waited for a processor so far.

    Source: the kernel's ``schedstat``; without it, the thread's time on a processor.
    """
    try:
        ran, waited, _ = Path("/proc/thread-self/schedstat").read_text().split()
    except (OSError, ValueError):
        return time.thread_time()
    return (int(ran) + int(waited)) / 1e9


class Busy:
    """The share of the time that a thread ran or wanted to run, since it was asked last.

    Asked from the thread itself.

    Args:
        clock: seconds.
        busy_s: seconds of the thread, as :func:`wanted_s`.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        busy_s: Callable[[], float] = wanted_s,
    ) -> None:
        self._now = lambda: (clock(), busy_s())
        self._before = self._now()

    def share(self) -> float:
        """Return it, from 0 to 1."""
        before, self._before = self._before, self._now()
        passed, busy = (now - then for now, then in zip(self._before, before, strict=True))
        return min(1.0, busy / passed) if passed > 0 else 0.0
