"""Who trains: the generations of a run's workers. Pure: time is told to it, it sends nothing.

A *generation* is a set of members with ranks. It lasts until a member is lost, or until its members
are called together to take newcomers in or to let somebody go. Then every member that is left
*arrives*, saying how many steps its state has seen, and the next generation is formed: survivors
first, in the order of their ranks, then newcomers as they came. Whoever finds the run full waits as
a spare.

Invariant: a member is in one place only: waiting, or in the generation; and a generation is formed
only when all its living members wait.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """Members that make steps together.

    Attributes:
        number: counts the generations of a run, over restarts too.
        members: their names, by rank.
        steps: how many steps each one's state has seen; None for a member without state.
    """

    number: int
    members: tuple[str, ...]
    steps: Mapping[str, int | None]

    @property
    def source(self) -> int | None:
        """The rank whose state counts, the furthest on; None when nobody has any."""
        reached = [self.steps[m] for m in self.members]
        best = max((s for s in reached if s is not None), default=None)
        return None if best is None else reached.index(best)

    @property
    def behind(self) -> tuple[int, ...]:
        """The ranks that need the state of the source."""
        if self.source is None:
            return ()
        best = self.steps[self.members[self.source]]
        return tuple(r for r, m in enumerate(self.members) if self.steps[m] != best)


@dataclass
class Membership:
    """Decides when a generation begins and who is in it.

    Attributes:
        fewest: members that a beginning takes (survivors go on with any number).
        most: members at the most.
        expected: members that a beginning waits for, unless all that are present have arrived and
            nobody came for ``settle_s``.
        settle_s: that time, seconds.
        number: of the next generation.
    """

    fewest: int
    most: int
    expected: int
    settle_s: float = 10.0
    number: int = 0
    members: list[str] = field(default_factory=list[str])
    waiting: dict[str, int | None] = field(default_factory=dict[str, int | None])
    leaving: set[str] = field(default_factory=set[str])
    present: set[str] = field(default_factory=set[str])
    forming: Generation | None = None
    _last_arrival: float = 0.0

    def enter(self, member: str) -> None:
        """A member is there, but not ready: it may have its model to build."""
        self.present.add(member)

    def arrive(self, member: str, step: int | None, now: float) -> None:
        """A member waits for the next generation; ``now`` in seconds of any steady clock."""
        self.present.add(member)
        self.waiting[member] = step
        self._last_arrival = now

    def lose(self, member: str) -> None:
        """A member is gone. If a generation was being formed with it, that is taken back.

        Its first member, the only one that has been told of it, arrives anew by itself.
        """
        self.present.discard(member)
        self.waiting.pop(member, None)
        self.leaving.discard(member)
        forming = self.forming
        if forming is not None and member in forming.members:
            untold = [m for m in forming.members[1:] if m != member]
            self.waiting = {**{m: forming.steps[m] for m in untold}, **self.waiting}
            self.members = [
                m for m in forming.members if m != member and forming.steps[m] is not None
            ]
            self.forming = None
        elif member in self.members:
            self.members.remove(member)

    def release(self, member: str) -> None:
        """Let a member go at the next boundary between steps."""
        if member in self.members or member in self.waiting:
            self.leaving.add(member)

    @property
    def calls(self) -> bool:
        """Whether the generation should come together at its next boundary."""
        if not self.members or self.forming is not None:
            return False
        if self.leaving.intersection(self.members):
            return True
        return len(self.members) < self.most and any(
            m not in self.members and m not in self.leaving for m in self.waiting
        )

    def form(self, now: float) -> Generation | None:
        """Return the next generation if it is time for one, *forming* until :meth:`formed`."""
        if self.forming is not None or any(m not in self.waiting for m in self.members):
            return None
        staying = [m for m in self.members if m not in self.leaving]
        new = [m for m in self.waiting if m not in self.members and m not in self.leaving]
        chosen = (staying + new)[: max(self.most, len(staying))]
        if not staying and not self._begins(len(chosen), now):
            return None
        steps = {m: self.waiting.pop(m) for m in chosen}
        self.members = chosen
        self.forming = Generation(number=self.number, members=tuple(chosen), steps=steps)
        self.number += 1
        return self.forming

    def _begins(self, count: int, now: float) -> bool:
        if count < self.fewest:
            return False
        if count >= min(self.expected, self.most):
            return True
        settled = now - self._last_arrival >= self.settle_s
        return settled and self.present <= self.waiting.keys()

    def formed(self) -> None:
        """The generation's members have been told of it."""
        self.forming = None

    def depart(self) -> list[str]:
        """Return, once, the members that were to leave and have arrived at a boundary."""
        gone = [m for m in self.waiting if m in self.leaving]
        for member in gone:
            self.lose(member)
        return gone
