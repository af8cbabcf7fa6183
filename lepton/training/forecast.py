"""How long a run takes and what it costs, by the number of workers. Pure.

A global batch is shared by all workers, so a row takes ``compute / N + fixed`` seconds with N of
them: what is shared shrinks, what is not (summing gradients, talking to each other) stays. Both are
fitted to what was measured by least squares, weighted by the time measured; from one number of
workers alone scaling cannot be told, and ``fixed`` is 0.

    T(N) = start + rows * (compute / N + fixed)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_SPAN = re.compile(r"(?:\d+(?:\.\d+)?[dhms])+")
_PART = re.compile(r"(\d+(?:\.\d+)?)([dhms])")


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a number of workers did.

    Attributes:
        workers: how many.
        rows: they trained on, together.
        seconds: that took, without beginnings and changes of the workers.
    """

    workers: int
    rows: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How fast a run is.

    Attributes:
        start: seconds from the call until the first step.
        compute: seconds a row that workers share.
        fixed: seconds a row that they do not.
        sizes: numbers of workers that were measured.
    """

    start: float
    compute: float
    fixed: float
    sizes: tuple[int, ...]

    @property
    def rows_per_second(self) -> float:
        """Of one worker alone."""
        return 1 / (self.compute + self.fixed)

    def row_s(self, workers: int) -> float:
        """Return the seconds that a row takes."""
        return self.compute / workers + self.fixed

    def efficiency(self, workers: int) -> float:
        """Return the share of perfect scaling that is reached, 0 to 1."""
        return self.row_s(1) / (workers * self.row_s(workers))

    def seconds(self, rows: int, workers: int) -> float:
        """Return how long a run takes."""
        return self.start + rows * self.row_s(workers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Pace:
        """Read it back."""
        return Pace(
            start=data["start"],
            compute=data["compute"],
            fixed=data["fixed"],
            sizes=tuple(data["sizes"]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A number of workers and what it means.

    Attributes:
        workers: how many.
        seconds: from the call to the end.
        worker_seconds: paid for.
        cost: in the price's currency; None without a price.
        efficiency: share of perfect scaling, 0 to 1.
        extrapolated: whether so few or so many workers were never measured.
    """

    workers: int
    seconds: float
    worker_seconds: float
    cost: float | None
    efficiency: float
    extrapolated: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What to expect.

    Attributes:
        rows: to train on, over all epochs.
        pace: it is made from.
        choices: by number of workers.
        deadline: seconds, or None.
    """

    rows: int
    pace: Pace
    choices: tuple[Choice, ...]
    deadline: float | None

    @property
    def best(self) -> Choice | None:
        """The cheapest choice within the deadline, of equals the smallest; None if none is."""
        limit = self.deadline
        fitting = [c for c in self.choices if limit is None or c.seconds <= limit]
        return min(fitting, key=lambda c: (c.worker_seconds, c.workers), default=None)


def fit(measured: Sequence[Measured], start: float) -> Pace:
    """Return the pace that fits what was measured best.

    Args:
        measured: at least one, each with rows and seconds.
        start: seconds until the first step.

    Raises:
        ValueError: nothing was measured.
    """
    known = [m for m in measured if m.rows > 0 and m.seconds > 0]
    if not known:
        raise ValueError("no two steps in a row were measured")
    sizes = tuple(sorted({m.workers for m in known}))
    weight = sum(m.seconds for m in known)
    share = sum(m.seconds / m.workers for m in known) / weight
    mean = sum(m.seconds * m.seconds / m.rows for m in known) / weight
    over = sum(m.seconds * (1 / m.workers - share) * (m.seconds / m.rows - mean) for m in known)
    under = sum(m.seconds * (1 / m.workers - share) ** 2 for m in known)
    compute = over / under if len(sizes) > 1 else mean / share
    fixed = mean - compute * share
    if fixed < 0 or len(sizes) == 1:  # better than perfect scaling is luck
        compute, fixed = mean / share, 0.0
    if compute < 0:  # more workers were slower: nothing is shared
        compute, fixed = 0.0, mean
    return Pace(start=max(0.0, start), compute=compute, fixed=fixed, sizes=sizes)


def forecast(
    pace: Pace,
    rows: int,
    workers: tuple[int, int],
    *,
    deadline: float | None = None,
    price: float | None = None,
) -> Forecast:
    """Return what each number of workers means.

    Args:
        pace: of a run like this one.
        rows: over all epochs.
        workers: the fewest and the most.
        deadline: seconds.
        price: of a worker (its GPU) for an hour.

    Raises:
        ValueError: no rows, no workers, or a negative price or deadline.
    """
    fewest, most = workers
    if rows < 1 or not 1 <= fewest <= most:
        raise ValueError(f"there must be rows and workers: rows={rows}, workers={workers}")
    if (deadline is not None and deadline <= 0) or (price is not None and price < 0):
        raise ValueError(f"deadline={deadline} and price={price} must not be negative")
    choices: list[Choice] = []
    for n in range(fewest, most + 1):
        lasts = pace.seconds(rows, n)
        choices.append(
            Choice(
                workers=n,
                seconds=lasts,
                worker_seconds=n * lasts,
                cost=None if price is None else n * lasts / 3600 * price,
                efficiency=pace.efficiency(n),
                extrapolated=not pace.sizes[0] <= n <= pace.sizes[-1],
            )
        )
    return Forecast(rows=rows, pace=pace, choices=tuple(choices), deadline=deadline)


def seconds_of(text: str | float) -> float:
    """Return a time span such as ``2h``, ``1h30m``, ``45s`` or a number of seconds.

    Raises:
        ValueError: it is none.
    """
    if isinstance(text, int | float):
        return float(text)
    if text.replace(".", "", 1).isdigit():
        return float(text)
    if not _SPAN.fullmatch(text):
        raise ValueError(f"{text!r} is no time span: write 2h, 1h30m, 45s or a number of seconds")
    return sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))
