"""The step log: what every rank gave to every step, written before the gradients are summed.

Two JSON lines a step, each appended with one write call to a file of its own per attempt and rank:
what the rank contributes, before the collective; and that the step was made, after it. So what a
killed worker had contributed to a step that its peers completed can be read afterwards. An
*attempt* is one generation of workers (:mod:`lepton.training.membership`). It begins at the step
that the furthest survivor had made, or at the newest checkpoint if nobody survived. A step counts
in the attempt that made it last.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lepton.stream import Digest


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """How one generation of workers began, written by its rank 0."""

    number: int
    session: str
    step: int
    world_size: int
    pids: tuple[int, ...]
    hosts: tuple[str, ...]
    time_ns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One rank's record of one optimiser step.

    Attributes:
        step: optimiser steps made, this one included.
        epoch, batch: the global batch it consumed.
        rows: rows of this rank's slice.
        high, low: digest of the rows consumed (see :class:`lepton.stream.Digest`).
        loss: mean loss over the global batch; None if this rank did not see the step made.
        time_ns: when it was made, Unix nanoseconds; 0 if this rank did not see that.
        ids: identities of the rows, when the run is audited.
    """

    step: int
    epoch: int
    batch: int
    rows: int
    high: int
    low: int
    loss: float | None = None
    time_ns: int = 0
    ids: Sequence[int] | None = None

    @property
    def digest(self) -> Digest:
        """The digest as a value that adds up."""
        return Digest(self.high, self.low, self.rows)


class StepLog:
    """Appends one rank's steps of one attempt."""

    def __init__(self, folder: Path, attempt: int, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{attempt:04d}-{rank:04d}.jsonl"
        self._file = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)

    def contribute(self, step: Step) -> None:
        """Append what this rank gives to a step that is about to be made."""
        ids = "null" if step.ids is None else json.dumps(step.ids)
        line = (
            f'{{"step":{step.step},"epoch":{step.epoch},"batch":{step.batch},"rows":{step.rows},'
            f'"high":{step.high},"low":{step.low},"ids":{ids}}}\n'
        )
        self._append(line.encode())

    def made(self, step: int, loss: float, time_ns: int) -> None:
        """Append that the step was made."""
        line = f'{{"made":{step},"loss":{json.dumps(loss)},"time_ns":{time_ns}}}\n'
        self._append(line.encode())

    def _append(self, line: bytes) -> None:
        """Write a whole line or nothing.

        Raises:
            OSError: the disk is full or gone.
        """
        written = os.write(self._file, line)
        if written < len(line):  # what a disk does that is full just now
            os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def write_attempt(folder: Path, attempt: Attempt) -> None:
    """Record the beginning of an attempt."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{attempt.number:04d}.json"
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(attempt)))
    temporary.replace(target)


def attempts_of(folder: Path) -> list[Attempt]:
    """Return the attempts of a run, first to last."""
    found: list[Attempt] = []
    for path in sorted(folder.glob("[0-9]*.json")):
        body: dict[str, Any] = json.loads(path.read_text())
        body["pids"], body["hosts"] = tuple(body["pids"]), tuple(body["hosts"])
        found.append(Attempt(**body))
    return found


def steps_of(folder: Path, attempt: int) -> dict[int, list[Step]]:
    """Return the steps made in an attempt; a step's list has one entry a rank of it.

    A step that nobody saw made (its workers went away in the middle of it) is left out.
    """
    given: dict[int, list[Step]] = {}
    made: set[int] = set()
    for path in sorted(folder.glob(f"{attempt:04d}-*.jsonl")):
        for step in _lines_of(path):
            given.setdefault(step.step, []).append(step)
            if step.loss is not None:
                made.add(step.step)
    return {n: steps for n, steps in sorted(given.items()) if n in made}


def _lines_of(path: Path) -> list[Step]:
    """Return a rank's steps, in order; a last line cut off by a kill is left out."""
    found: dict[int, Step] = {}
    for line in path.read_bytes().split(b"\n")[:-1]:
        body: dict[str, Any] = json.loads(line)
        if "made" in body:
            step = found[body["made"]]
            found[step.step] = replace(step, loss=body["loss"], time_ns=body["time_ns"])
        else:
            found[body["step"]] = Step(**body)
    return list(found.values())


def loss_of(step: Sequence[Step]) -> float:
    """Return the mean loss of a step over its global batch."""
    return next(s.loss for s in step if s.loss is not None)


def effective(attempts: Sequence[tuple[Attempt, dict[int, list[Step]]]]) -> dict[int, list[Step]]:
    """Return the records that made the final weights: each step as its last attempt made it.

    An attempt that began at step *b* supersedes whatever earlier attempts did after *b*.
    """
    counted: dict[int, list[Step]] = {}
    for attempt, steps in attempts:
        counted = {n: s for n, s in counted.items() if n <= attempt.step}
        counted.update(steps)
    return counted


def replayed(attempts: Sequence[tuple[Attempt, dict[int, list[Step]]]]) -> int:
    """Return how many steps that had been made were made again, after all workers were lost."""
    total, reached = 0, 0
    for attempt, steps in attempts:
        total += max(0, reached - attempt.step)
        reached = max(steps, default=attempt.step)
    return total
