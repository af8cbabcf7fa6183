"""Who holds the others up. Pure: times are told to it.

All ranks wait for the slowest in every step, so all steps take as long; what tells a straggler is
its *own part*: from asking for its batch until it has its gradients, before it waits for anybody.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

FACTOR = 2.0
LEAST_S = 0.01
"""Differences below this are noise, seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slow:
    """A worker that is slow.

    Attributes:
        who: its name.
        own_s: what its own part of a step takes, seconds.
        others_s: the median of the others'.
    """

    who: str
    own_s: float
    others_s: float

    @property
    def text(self) -> str:
        """In words."""
        times = self.own_s / self.others_s if self.others_s > 0 else float("inf")
        return (
            f"its part of a step takes {self.own_s:.3g} s, {times:.1f} times the others' "
            f"{self.others_s:.3g} s"
        )


@dataclass
class Stragglers:
    """Decides who is named.

    Attributes:
        lasting_s: how long a worker must be slow without a break, seconds.
        factor: how many times the median of the others it takes.
    """

    lasting_s: float = 5.0
    factor: float = FACTOR
    _since: dict[str, float] = field(default_factory=dict[str, float])
    _named: set[str] = field(default_factory=set[str])

    def look(self, own: Mapping[str, float], now: float) -> list[Slow]:
        """Return those that are to be named now, each once until it keeps up again.

        Args:
            own: each member's own part of a step, seconds.
            now: of any steady clock, seconds.
        """
        slow = {name: found for name in own if (found := self._compared(name, own)) is not None}
        self._since = {name: self._since.get(name, now) for name in slow}
        self._named &= slow.keys()
        due = [n for n, since in self._since.items() if now - since >= self.lasting_s]
        fresh = [slow[n] for n in due if n not in self._named]
        self._named.update(s.who for s in fresh)
        return fresh

    def _compared(self, name: str, own: Mapping[str, float]) -> Slow | None:
        others = [s for other, s in own.items() if other != name]
        if not others:
            return None
        median = statistics.median(others)
        if own[name] < self.factor * median or own[name] - median < LEAST_S:
            return None
        return Slow(who=name, own_s=own[name], others_s=median)
