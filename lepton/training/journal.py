"""A worker's record of the run: the step log, and the spans of epochs, failures and resizes."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from lepton import telemetry
from lepton.stream import Part
from lepton.stream.mixture import MixedPart
from lepton.training.group import Group
from lepton.training.plan import Plan
from lepton.training.run import next_attempt
from lepton.training.steps import Attempt, Step, StepLog, attempts_of, steps_of, write_attempt


@dataclass(slots=True)
class _Broken:
    """Since when no step was made, whether by a loss, and how many are to be made again."""

    since_ns: int = 0
    lost: bool = False
    replayed: int = 0


@dataclass(slots=True)
class Epoch:
    """The epoch under way and when this run began it, Unix nanoseconds; 0 if it is over."""

    number: int = -1
    began_ns: int = 0


class Journal:
    """Writes what one worker does.

    Args:
        plan: of the run.
        group: this worker's place, which changes.
    """

    def __init__(self, plan: Plan, group: Group) -> None:
        self.epoch = Epoch()
        self._plan = plan
        self._group = group
        self._logs = Path(plan.folder) / "steps"
        self._log: StepLog | None = None
        self._broken = _Broken()

    def open(self, step: int) -> int:
        """Begin this generation's log at a step; return the generation's number."""
        place = self._group.place
        number = place.number if self._group.seat else next_attempt(Path(self._plan.folder))
        if place.rank == 0:
            attempt = Attempt(
                number=number,
                session=self._plan.session,
                step=step,
                world_size=place.world_size,
                pids=place.pids or (os.getpid(),),
                hosts=place.hosts or (socket.gethostname(),),
                time_ns=time.time_ns(),
            )
            write_attempt(self._logs, attempt)
        self.close()
        self._log = StepLog(self._logs, number, place.rank)
        return number

    def close(self) -> None:
        """Close the log."""
        if self._log is not None:
            self._log.close()
        self._log = None

    def contribute(self, step: int, part: Part | MixedPart) -> None:
        """Write what this rank gives to a step."""
        assert self._log is not None  # noqa: S101 - opened with the generation
        digest = part.digest
        self._log.contribute(
            Step(
                step=step,
                epoch=part.epoch,
                batch=part.step,
                rows=len(part.ids),
                high=digest.high,
                low=digest.low,
                ids=cast("list[int]", part.ids.tolist()) if self._plan.audit else None,
            )
        )

    def made(self, step: int, mean: float) -> None:
        """Write that a step was made, and, if it ended a pause, how long that was."""
        assert self._log is not None  # noqa: S101 - opened with the generation
        now = time.time_ns()
        self._log.made(step, mean, now)
        if not self._broken.since_ns:
            return
        broken, self._broken = self._broken, _Broken()
        if self._group.rank == 0:
            telemetry.record(
                "lepton.train.failure" if broken.lost else "lepton.train.resize",
                self._plan.carrier,
                broken.since_ns,
                now,
                error="WorkerLost" if broken.lost else None,
                attributes={
                    "lepton.step": step - 1,
                    "lepton.steps_replayed": broken.replayed,
                    "lepton.world_size": self._group.world_size,
                },
            )

    def interrupted(self, *, lost: bool) -> None:
        """Begin a pause: a peer was lost, or the workers come together."""
        self._broken.since_ns = self._broken.since_ns or time.time_ns()
        self._broken.lost = self._broken.lost or lost

    def resumed(self, step: int) -> None:
        """The run goes on from a checkpoint: if workers were lost before, that is a pause."""
        former = next(iter(reversed(attempts_of(self._logs))), None)
        if former is None or former.session != self._plan.session:
            return
        made = steps_of(self._logs, former.number)
        last = max(made, default=former.step)
        since = max((s.time_ns for s in made.get(last, [])), default=former.time_ns)
        self._broken = _Broken(since_ns=since, lost=True, replayed=last - step)

    def turn_to(self, epoch: int, step: int) -> None:
        """Begin another epoch, if it is another one."""
        if epoch != self.epoch.number:
            self.end_epoch(step)
            self.epoch = Epoch(epoch, time.time_ns())

    def end_epoch(self, step: int) -> None:
        """Record the epoch under way as over."""
        if self._group.rank == 0 and self.epoch.began_ns:
            telemetry.record(
                "lepton.train.epoch",
                self._plan.carrier,
                self.epoch.began_ns,
                attributes={
                    "lepton.epoch": self.epoch.number,
                    "lepton.step": step,
                    "lepton.world_size": self._group.world_size,
                },
            )
        self.epoch.began_ns = 0
