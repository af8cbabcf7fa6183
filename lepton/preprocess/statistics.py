"""What fitting needs to know about a column, gathered in one pass.

The result depends on the values and their order, never on how they are cut into batches: running
sums are taken over blocks of a fixed number of values, whatever arrives.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lepton.preprocess.elements import Floats, numbers_in

BLOCK = 65_536

Rule: TypeAlias = Literal["mean", "median", "most_frequent"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """Count, range, mean and summed squared deviation of a set of numbers."""

    count: int = 0
    low: float = math.inf
    high: float = -math.inf
    mean: float = 0.0
    deviation: float = 0.0

    @classmethod
    def of(cls, values: Floats) -> Moments:
        """Return the moments of some values, in two passes over them."""
        if not len(values):
            return cls()
        with np.errstate(over="ignore", invalid="ignore"):  # steps refuse what is not finite
            mean = float(values.mean())
            deviation = float(np.square(values - mean).sum())
        return cls(
            count=len(values),
            low=float(values.min()),
            high=float(values.max()),
            mean=mean,
            deviation=deviation,
        )

    @classmethod
    def constant(cls, value: float, count: int) -> Moments:
        """Return the moments of ``count`` copies of one value."""
        if not count:
            return cls()
        return cls(count=count, low=value, high=value, mean=value)

    def __add__(self, other: Moments) -> Moments:
        """Merge two sets (Chan, Golub, LeVeque 1979)."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        delta = other.mean - self.mean
        return Moments(
            count=count,
            low=min(self.low, other.low),
            high=max(self.high, other.high),
            mean=self.mean + delta * (other.count / count),
            deviation=self.deviation
            + other.deviation
            + delta * delta * (self.count * (other.count / count)),
        )

    def center(self) -> float:
        """Return the mean, kept inside the range that rounding may leave by a last digit."""
        return min(max(self.mean, self.low), self.high)

    def spread(self) -> float:
        """Return the population's standard deviation, exactly 0 for a constant."""
        return 0.0 if self.low == self.high else math.sqrt(self.deviation / self.count)


@dataclass(kw_only=True, slots=True)
class Summary:
    """One column's statistics: the numbers, and where asked for every value or its counts.

    Attributes:
        numeric: keep moments (and refuse infinite values).
        keep: keep all numbers, for a median: 8 bytes a value.
        tally: count each distinct value, for categories and most_frequent.
        missing: nulls and NaNs seen.
    """

    column: str
    numeric: bool = False
    keep: bool = False
    tally: bool = False
    missing: int = 0
    counts: Counter[Any] = field(default_factory=Counter[Any])
    _moments: Moments = field(default_factory=Moments)
    _pending: list[Floats] = field(default_factory=list[Floats])
    _waiting: int = 0
    _kept: list[Floats] = field(default_factory=list[Floats])

    def add(self, column: pa.ChunkedArray[Any]) -> None:
        """Take in the next rows of the column."""
        if self.numeric:
            for values in numbers_in(column):
                self._add_numbers(values)
        else:
            gone: Any = pc.is_null(column, nan_is_null=True)
            self.missing += gone.to_numpy().sum().item()
        if self.tally:
            self._count(column)

    def moments(self) -> Moments:
        """Return the moments of all numbers so far."""
        return self._moments + Moments.of(_joined(self._pending))

    def fill_value(self, rule: Rule) -> Any:
        """Return the value of a fill rule.

        Raises:
            ValueError: there is no value to derive it from.
        """
        if not (self.counts if rule == "most_frequent" else self.moments().count):
            raise ValueError(
                f"column {self.column!r} has no values to take a {rule} from: fill it with a "
                "constant or leave it out"
            )
        if rule == "mean":
            return self.moments().center()
        if rule == "median":
            return float(np.median(_joined(self._kept)))
        most = max(self.counts.values())
        return min(v for v, n in self.counts.items() if n == most)

    def filled(self, value: Any) -> tuple[Moments, Mapping[Any, int]]:
        """Return moments and counts as if ``value`` stood in every missing place."""
        counts = self.counts + Counter({value: self.missing} if self.tally else {})
        if not self.numeric:
            return Moments(), counts
        return self.moments() + Moments.constant(float(value), self.missing), counts

    def _add_numbers(self, values: Floats) -> None:
        gone = np.isnan(values)
        self.missing += int(gone.sum())
        present = values[~gone] if gone.any() else values
        if np.isinf(present).any():
            raise ValueError(
                f"column {self.column!r} has infinite values: filter those rows out, for example "
                "with where, or leave the column out"
            )
        if self.keep:
            self._kept.append(present)
        while self._waiting + len(present) >= BLOCK:
            room = BLOCK - self._waiting
            block = _joined([*self._pending, present[:room]])
            self._moments = self._moments + Moments.of(block)
            self._pending, self._waiting, present = [], 0, present[room:]
        if len(present):
            self._pending.append(present.copy())  # not a view that keeps a whole batch alive
            self._waiting += len(present)

    def _count(self, column: pa.ChunkedArray[Any]) -> None:
        present = pc.filter(column, pc.invert(pc.is_null(column, nan_is_null=True)))
        counted: Any = pc.value_counts(present)
        values, counts = counted.field("values").to_pylist(), counted.field("counts").to_pylist()
        for value, count in zip(values, counts, strict=True):
            self.counts[value] += count


def _joined(parts: list[Floats]) -> Floats:
    return np.concatenate(parts) if parts else np.empty(0, np.float64)
