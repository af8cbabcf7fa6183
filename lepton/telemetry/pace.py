"""The pace of a worker's steps: gathered in plain memory, told once a second and in windows.

A span or an instrument's call for every step would cost more than the step where steps take a
millisecond. Here a step costs one append; a thread makes histograms of it each second, and every
few seconds a ``lepton.steps`` span. A step far slower than those before it has a span of its own,
the slowest of each second. The window under way is written once a second: a killed worker
loses the last second of it in the file, and all of it at the collector.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from lepton.telemetry.context import Carrier, encoder_of
from lepton.telemetry.delivery import look_after_ends, prepare
from lepton.telemetry.gpus import watch_gpus
from lepton.telemetry.metrics import measure, measure_all, measuring
from lepton.telemetry.rounds import rounds
from lepton.telemetry.spans import Growing, record

WINDOW_NS = 5_000_000_000
MOST = 1_000_000
"""Steps that wait at the most, should the thread be held up; more push the oldest out."""
SLOW_TIMES, SLOW_S = 5, 0.05
"""So many times the median, and so many seconds beyond it, make a step a slow one."""
LATELY, FEW = 256, 16
"""Steps that the median is of, and how many there must be."""


class Paced(NamedTuple):
    """One step of one worker; times are Unix nanoseconds.

    Attributes:
        number: the step.
        asked_ns: when its batch was asked for.
        got_ns: when the batch was there.
        made_ns: when the step was made.
        rows: rows of this worker's slice.
        place: rank and world size.
    """

    number: int
    asked_ns: int
    got_ns: int
    made_ns: int
    rows: int
    place: tuple[int, int]

    @property
    def seconds(self) -> float:
        """How long it took, never negative though clocks may be set back."""
        return max(0, self.made_ns - self.asked_ns) / 1e9

    @property
    def waited(self) -> float:
        """Seconds for which it waited for its batch."""
        return max(0, self.got_ns - self.asked_ns) / 1e9


class Pace:
    """Gathers a worker's steps.

    Args:
        carrier: of the run.

    Attributes:
        add: takes a :class:`Paced`; the only thing called in a step.
    """

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        self._waiting: deque[Paced] = deque(maxlen=MOST)
        self._window: list[Paced] = []
        self._span: Growing | None = None
        self._lately: deque[float] = deque(maxlen=LATELY)
        self._lock = threading.Lock()
        self.add = self._waiting.append
        prepare()
        encoder_of(os.getpid())  # which cannot be made any more where a process ends
        self._leave = rounds.join(self.tell)
        self._leave_gpus = watch_gpus()
        look_after_ends()

    def tell(self, last: bool) -> None:
        """Tell of the steps since the last time; ``last`` also ends the window under way."""
        with self._lock:
            fresh = [self._waiting.popleft() for _ in range(len(self._waiting))]
            if fresh and measuring():
                _measure(fresh)
            self._tell_of_slow(fresh)
            for step in fresh:
                if self._window and _apart(self._window[0], step):
                    self._end_window()
                self._window.append(step)
            if self._window and (last or _over(self._window[0])):
                self._end_window()
            elif fresh:
                self._under_way().write(self._window[-1].made_ns, _told(self._window))

    def close(self) -> None:
        """Tell of what is left, and stop."""
        self._leave()
        self._leave_gpus()
        self.tell(True)

    def _tell_of_slow(self, fresh: Sequence[Paced]) -> None:
        """Record the slowest of some steps, if it is far slower than those before them."""
        slowest = max(fresh, key=_seconds, default=None)
        before = sorted(self._lately)
        self._lately.extend(map(_seconds, fresh[-LATELY:]))
        if slowest is None or len(before) < FEW:
            return
        usual = quantile(before, 0.5)
        if slowest.seconds > max(SLOW_TIMES * usual, usual + SLOW_S):
            record(
                "lepton.slow_step",
                self._carrier,
                slowest.asked_ns,
                slowest.made_ns,
                attributes=_of_one(slowest),
            )

    def _under_way(self) -> Growing:
        if self._span is None:
            self._span = Growing("lepton.steps", self._carrier, self._window[0].asked_ns)
        return self._span

    def _end_window(self) -> None:
        self._under_way().end(self._window[-1].made_ns, _told(self._window))
        self._window, self._span = [], None


def _told(steps: Sequence[Paced]) -> dict[str, Any]:
    """Return the attributes of a window."""
    took = sorted(s.seconds for s in steps)
    rank, world_size = steps[-1].place
    return {
        "lepton.rank": rank,
        "lepton.world_size": world_size,
        "lepton.step": steps[-1].number,
        "lepton.steps": len(steps),
        "lepton.rows": sum(s.rows for s in steps),
        "lepton.input_wait_s": sum(s.waited for s in steps),
        "lepton.step_s.p50": quantile(took, 0.5),
        "lepton.step_s.p99": quantile(took, 0.99),
        "lepton.step_s.max": took[-1],
    }


def _of_one(step: Paced) -> dict[str, Any]:
    """Return the attributes of a single step."""
    rank, world_size = step.place
    return {
        "lepton.rank": rank,
        "lepton.world_size": world_size,
        "lepton.step": step.number,
        "lepton.rows": step.rows,
        "lepton.input_wait_s": step.waited,
    }


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the smallest value that at least this share of the values does not exceed."""
    return ordered[max(0, -int(-len(ordered) * share // 1) - 1)]


def _seconds(step: Paced) -> float:
    return step.seconds


def _apart(first: Paced, step: Paced) -> bool:
    return step.place != first.place or step.made_ns - first.asked_ns > WINDOW_NS


def _over(first: Paced) -> bool:
    return time.time_ns() - first.asked_ns > WINDOW_NS


def _measure(steps: Sequence[Paced]) -> None:
    """Tell of a second's steps."""
    rows = sum(s.rows for s in steps)
    elapsed = (steps[-1].made_ns - steps[0].asked_ns) / 1e9
    measure("lepton.train.rows", rows)
    measure("lepton.train.input_wait", sum(s.waited for s in steps))
    measure_all("lepton.train.step.duration", [s.seconds for s in steps])
    if elapsed > 0:
        measure("lepton.train.rows_per_second", rows / elapsed)
    if steps[-1].place[0] == 0:
        measure("lepton.train.steps", sum(s.place[0] == 0 for s in steps))
        measure("lepton.train.world_size", steps[-1].place[1])
