"""A worker's record of the run: the step log, and the spans of epochs, failures and resizes."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from lepton import checkpoints, telemetry
from lepton.errors import TrainingError
from lepton.stream import Part
from lepton.stream.mixture import MixedPart
from lepton.training.board import Board
from lepton.training.evaluations import Judged
from lepton.training.group import Group
from lepton.training.plan import Plan
from lepton.training.refusals import unwritable
from lepton.training.run import next_attempt
from lepton.training.steps import Attempt, Step, StepLog, attempts_of, steps_of, write_attempt

log = logging.getLogger("lepton")


@dataclass(slots=True)
class _Broken:
    """A pause: since when no step was made, when the workers had met, and when all had the state.

    Attributes:
        given_ns: when this worker had given its part to the step that was broken, if to any.
        lost: whether a worker was lost.
        replayed: steps that are to be made again.
    """

    since_ns: int = 0
    met_ns: int = 0
    held_ns: int = 0
    lost: bool = False
    replayed: int = 0
    given_ns: int = 0


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
        run = {"lepton.run": Path(plan.folder).name}
        self._forget_logs = telemetry.keep_logs(
            plan.carrier,
            lambda: {**run, "lepton.rank": group.rank},
            Path(plan.folder) / "logs",
            code=plan.code,
        )
        self._broken = _Broken()
        self._pace: telemetry.Pace | None = None
        self._over = False
        self._began_ns, self._paused_ns = time.time_ns(), 0
        self._unwatch = telemetry.watch("lepton.train.goodput", self._goodput)
        self._asked_ns = self._got_ns = self._rows = self._all_rows = 0
        self._given_ns = 0  # since when the others are waited for; 0 between two steps
        self._board = Board(plan.tensorboard)

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
        self._pace = self._pace or telemetry.Pace(self._plan.carrier)
        self._board.close()
        if place.rank == 0:
            self._board.open(step)
        return number

    def close(self) -> None:
        """Close the log."""
        if self._log is not None:
            self._log.close()
        self._log = None

    def end(self) -> None:
        """Tell of the last steps; the run is over for this worker."""
        if self._pace is not None:
            self._pace.close()
        self._pace = None
        self._unwatch()
        self._board.close()
        self._forget_logs()
        if not self._over:
            self._over = True
            telemetry.flush()  # Ray may end this process at once

    def judged(self, judged: Judged) -> None:
        """Tell of an evaluation."""
        self._board.judged(judged)

    def ask(self) -> None:
        """Note that a batch is asked for."""
        self._asked_ns = time.time_ns()

    def contribute(self, step: int, part: Part | MixedPart) -> None:
        """Write what this rank gives to a step.

        Raises:
            TrainingError: the disk is full or gone.
        """
        assert self._log is not None  # noqa: S101 - opened with the generation
        digest = part.digest
        self._rows, self._all_rows = len(part.ids), part.global_rows
        given = Step(
            step=step,
            epoch=part.epoch,
            batch=part.step,
            rows=self._rows,
            high=digest.high,
            low=digest.low,
            ids=cast("list[int]", part.ids.tolist()) if self._plan.audit else None,
        )
        with self._written(step):
            self._log.contribute(given)
        self._given_ns = time.time_ns()

    def made(self, step: int, mean: float) -> None:
        """Write that a step was made, and, if it ended a pause, how long that was."""
        assert self._log is not None  # noqa: S101 - opened with the generation
        assert self._pace is not None  # noqa: S101 - with the log
        now = time.time_ns()
        self._given_ns = 0
        with self._written(step):
            self._log.made(step, mean, now)
        place = (self._group.rank, self._group.world_size)
        times = (self._asked_ns, self._got_ns, now)
        self._pace.add(telemetry.Paced(step, *times, self._rows, place))
        self._board.made(step, mean, now, self._all_rows, self._group.world_size)
        if self._broken.since_ns:
            self._mended(step, now)

    @contextmanager
    def _written(self, step: int) -> Generator[None]:
        """Say what it means when the log cannot be written."""
        try:
            yield
        except OSError as e:
            whole = checkpoints.all_of(self._plan.kept_in, self._plan.options)
            raise TrainingError(unwritable(self._plan.folder, step, e, whole)) from e

    def _mended(self, step: int, now: int) -> None:
        """Tell of the pause that a step has ended."""
        broken, self._broken = self._broken, _Broken()
        self._paused_ns += max(0, now - max(broken.since_ns, self._began_ns))
        if self._group.rank == 0:
            if broken.lost:
                telemetry.measure("lepton.train.failures", 1, {"error.type": "WorkerLost"})
                telemetry.measure("lepton.train.steps_replayed", broken.replayed)
            log.info(
                "run %s goes on after step %d with %d workers: %s; %d steps are made again",
                Path(self._plan.folder).name,
                step - 1,
                self._group.world_size,
                "a worker was lost" if broken.lost else "workers came or left",
                broken.replayed,
            )
            telemetry.measure(
                "lepton.train.recovery.duration",
                max(0, now - broken.since_ns) / 1e9,
                {"lepton.cause": "loss" if broken.lost else "resize"},
            )
            carrier = telemetry.record(
                "lepton.train.failure" if broken.lost else "lepton.train.resize",
                self._plan.carrier,
                min(broken.given_ns or broken.since_ns, broken.since_ns),
                now,
                error="WorkerLost" if broken.lost else None,
                attributes={
                    "lepton.step": step - 1,
                    "lepton.steps_replayed": broken.replayed,
                    "lepton.world_size": self._group.world_size,
                },
            )
            if broken.given_ns:
                times = sorted((broken.given_ns, broken.since_ns))
                telemetry.record("lepton.recovery.detect", carrier, *times)
            if broken.since_ns <= broken.met_ns <= broken.held_ns <= now:
                met, held = broken.met_ns, broken.held_ns
                telemetry.record("lepton.recovery.meet", carrier, broken.since_ns, met)
                telemetry.record("lepton.recovery.state", carrier, met, held)
                telemetry.record("lepton.recovery.step", carrier, held, now)

    def _goodput(self) -> float | None:
        """Share of this worker's time in which no loss or resize kept it from steps; by rank 0."""
        if self._group.rank:
            return None
        now = time.time_ns()
        since = self._broken.since_ns
        paused = self._paused_ns + (now - max(since, self._began_ns) if since else 0)
        return min(1.0, max(0.0, 1 - paused / max(1, now - self._began_ns)))

    def interrupted(self, *, lost: bool) -> None:
        """Begin a pause: a peer was lost, or the workers come together."""
        self._broken.since_ns = self._broken.since_ns or time.time_ns()
        if lost and not self._broken.lost:
            self._broken.given_ns = self._given_ns
        self._broken.lost = self._broken.lost or lost
        self._given_ns = 0

    def met(self) -> None:
        """The workers have come together."""
        self._broken.met_ns = time.time_ns()

    def held(self) -> None:
        """All workers have the state to go on with."""
        self._broken.held_ns = time.time_ns()

    def resumed(self, step: int) -> None:
        """The run goes on from a checkpoint: if workers were lost before, that is a pause."""
        former = next(iter(reversed(attempts_of(self._logs))), None)
        if former is None or former.session != self._plan.session:
            return
        made = steps_of(self._logs, former.number)
        last = max(made, default=former.step)
        since = max((s.time_ns for s in made.get(last, [])), default=former.time_ns)
        met = self._broken.met_ns
        self._broken = _Broken(since_ns=since, met_ns=met, lost=True, replayed=last - step)

    def turn_to(self, epoch: int, step: int) -> None:
        """Begin another epoch, if it is another one: a batch of it is there."""
        self._got_ns = time.time_ns()
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
