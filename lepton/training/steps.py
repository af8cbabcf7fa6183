"""The step log: what every rank consumed in every step, written before the next one begins.

One JSON line a step, appended with one write call to a file of its own per attempt and rank, so
that what a killed worker had done can be read afterwards. An *attempt* is one life of the worker
group; a restart begins the next from the newest checkpoint, and the steps after that checkpoint
are made again. A step counts in the attempt that made it last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from lepton.stream import Digest


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """How one life of the worker group began: its first line, written by rank 0."""

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
        loss: mean loss over the global batch.
        high, low: digest of the rows consumed (see :class:`lepton.stream.Digest`).
        ids: identities of the rows, when the run is audited.
        time_ns: when it ended, Unix nanoseconds.
    """

    step: int
    epoch: int
    batch: int
    rows: int
    loss: float
    high: int
    low: int
    time_ns: int
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

    def write(self, step: Step) -> None:
        """Append one step."""
        os.write(self._file, json.dumps(asdict(step)).encode() + b"\n")

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
    """Return an attempt's records by step; a step's list has one entry a rank that made it."""
    found: dict[int, list[Step]] = {}
    for path in sorted(folder.glob(f"{attempt:04d}-*.jsonl")):
        for line in path.read_bytes().splitlines():
            step = Step(**json.loads(line))
            found.setdefault(step.step, []).append(step)
    return found


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
    """Return how many steps had to be made again after restarts."""
    total = 0
    for (_, before), (attempt, _) in pairwise(attempts):
        reached = max(before, default=attempt.step)
        total += max(0, reached - attempt.step)
    return total
