"""What is due at a boundary between two steps, and in which order. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Act(Enum):
    """What a worker does at a boundary."""

    JUDGE = "judge the nets, if that is due"
    CHECKPOINT = "write a checkpoint, if there is none of this step"
    WAIT = "wait until what was begun to be written is committed"
    JOIN = "come together as the next generation"


@dataclass(frozen=True, kw_only=True, slots=True)
class Due:
    """What was learned in a step that is to be done when the loop's body is through.

    Attributes:
        checkpoint: the step is one of those that are kept, or somebody is to leave.
        regroup: somebody waits to join, or is to leave.
        leaving: somebody is to leave.
        lost: a peer went away; the step was not made.
    """

    checkpoint: bool = False
    regroup: bool = False
    leaving: bool = False
    lost: bool = False

    def acts(self, *, sharded: bool) -> tuple[Act, ...]:
        """Return what is to be done, in order.

        A checkpoint carries the figures of its step, so the nets are judged before it; unless a
        peer is lost, or about to leave with a deadline. A sharded net goes back to the newest
        checkpoint when its ranks change, so there is one before, committed.

        Args:
            sharded: no rank has all of the state.
        """
        joins = self.lost or self.regroup
        wanted = (
            (Act.JUDGE, not (self.leaving or self.lost)),
            (Act.CHECKPOINT, self.checkpoint or (self.regroup and sharded)),
            (Act.WAIT, self.leaving or (self.regroup and sharded)),
            (Act.JOIN, joins),
            (Act.JUDGE, joins),
        )
        return tuple(act for act, due in wanted if due)


def after_step(step: int, every: int, *, called: int, leaving: int) -> Due:
    """Return what is due once a step was made.

    Args:
        step: optimiser steps made.
        every: steps between checkpoints.
        called: ranks that were called to come together after it.
        leaving: ranks that know that somebody is to leave then.
    """
    return Due(checkpoint=step % every == 0 or leaving > 0, regroup=called > 0, leaving=leaving > 0)


def at_end(due: Due, *, exhausted: bool) -> Due:
    """Return what is due when the loop has ended: nobody new joins one that ended by itself."""
    return Due(
        checkpoint=due.checkpoint,
        regroup=due.regroup and exhausted,
        leaving=due.leaving,
        lost=due.lost,
    )
