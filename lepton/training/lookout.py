"""The driver's look at a run: what happens to its workers, and when enough is enough."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions

from lepton import telemetry
from lepton.errors import TrainingError
from lepton.training.recovery import in_a_row

if TYPE_CHECKING:
    from lepton.telemetry import Carrier
    from lepton.training.plan import Plan
    from lepton.training.progress import Line
    from lepton.training.rendezvous import Event
    from lepton.training.reserves import Reserves
    from lepton.training.waiting import Waiting

ANSWER_S = 30.0
"""How long an actor of the run may take to answer."""
END_S = 3.0
"""How long Ray Train may take to end after the run has: it may wait for a node that is gone."""


@dataclass
class Lookout:
    """Looks after a run several times a second, from the driver."""

    plan: Plan
    meeting: Any
    reserves: Reserves
    line: Line
    waiting: Waiting
    max_failures: int
    stopped_at: float = 0.0
    slow: int = 0

    def __call__(self) -> bool:
        """Return whether the run has finished.

        Raises:
            TrainingError: a worker's loop raised, or too many workers were lost in a row.
        """
        self.reserves.look_after()
        status = self._asked()
        if status is None:
            return False  # a machine under load; the next poll asks again
        self.line.tell(status["events"])
        self.slow = record_stragglers(self.plan.carrier, status["events"], self.slow)
        if status["error"]:
            self.stopped_at = self.stopped_at or time.monotonic()
            if time.monotonic() - self.stopped_at > END_S:  # Ray Train would have said it better
                raise TrainingError(status["error"])
        losses = [e.step for e in status["events"] if e.kind == "lost"]
        lost = in_a_row(losses, self.plan.checkpoint_every)
        if lost > self.max_failures:
            raise TrainingError(
                f"run {self.plan.lineage['run']!r} lost {lost} workers without making "
                f"{self.plan.checkpoint_every} steps in between, which is more than max_failures="
                f"{self.max_failures}: look into the workers' logs, then train again by the same "
                "name to go on from the last checkpoint"
            )
        if status["events"]:
            self.reserves.start()
        self.waiting.look(
            started=bool(status["pids"] or status["events"]),
            stepped=any(status["members"].values()),
        )
        return bool(status["finished"])

    def _asked(self) -> Any:
        """Return the rendezvous' status, None if it did not answer: no poll may wait for ever."""
        try:
            return ray.get(self.meeting.status.remote(), timeout=ANSWER_S)
        except ray.exceptions.GetTimeoutError:
            return None


def record_stragglers(carrier: Carrier, events: list[Event], told: int) -> int:
    """Name those in the trace that hold the others up, each time once.

    Args:
        carrier: of the run.
        events: all so far.
        told: how many stragglers were named already.

    Returns:
        how many are named now.
    """
    found = [e for e in events if e.kind == "slow"]
    for event in found[told:]:
        telemetry.measure("lepton.train.stragglers", 1)
        telemetry.record(
            "lepton.train.straggler",
            carrier,
            event.time_ns,
            attributes={
                "lepton.worker": event.who,
                "lepton.step": event.step,
                "lepton.world_size": event.world_size,
            },
        )
    return len(found)
