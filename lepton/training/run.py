"""A run: what training left behind, read from its folder by anyone, at any time."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lepton import checkpoints
from lepton.checkpoints import Manifest
from lepton.errors import LakeError, TrainingError
from lepton.lake import home_of
from lepton.stream import Digest, Mixture, Stream
from lepton.stream.reader import expected_rows
from lepton.training import evaluations
from lepton.training.retention import BEST_BY, best_of
from lepton.training.steps import (
    Attempt,
    Step,
    attempts_of,
    effective,
    loss_of,
    replayed,
    steps_of,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True, slots=True)
class Consumption:
    """What a run's weights were made of, held against the plan.

    Attributes:
        rows: rows consumed by the steps that count.
        lost: rows that the plan has and no counted step consumed.
        repeated: consumptions beyond the first in the same epoch.
        order_hash: hash of rows and positions as consumed.
        expected_hash: the same from the plan.
    """

    rows: int
    lost: int
    repeated: int
    order_hash: str
    expected_hash: str

    @property
    def exact(self) -> bool:
        """Whether every row was consumed once, where the plan has it."""
        return self.order_hash == self.expected_hash and not self.lost and not self.repeated


@dataclass(frozen=True, kw_only=True, slots=True)
class Pause:
    """A change of the workers, and how long no step was made because of it.

    Attributes:
        step: the last one made before.
        seconds: from that step to the next.
        before, after: world sizes.
        replayed: steps made again.
    """

    step: int
    seconds: float
    before: int
    after: int
    replayed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A training run.

    Attributes:
        name: its name; training again by that name resumes it.
        folder: where its step logs and checkpoints are.
        trace_id: the trace it belongs to.
        traceparent: its own span, for links.
        kept_in: where its checkpoints are: below the folder, or on an object store.
        options: how that object store is reached.
    """

    name: str
    folder: str
    trace_id: str = ""
    traceparent: str = ""
    kept_in: str = ""
    options: Mapping[str, str] = field(default_factory=dict[str, str], repr=False, compare=False)

    @property
    def checkpoints(self) -> list[Manifest]:
        """All committed checkpoints, by step."""
        return checkpoints.all_of(self.where, self.options)

    @property
    def checkpoint(self) -> Manifest:
        """The newest checkpoint.

        Raises:
            TrainingError: there is none.
        """
        newest = checkpoints.latest(self.where, self.options, thorough=False)
        if newest is None:
            raise TrainingError(f"run {self.name!r} has no checkpoint yet: train it first")
        return newest

    @property
    def where(self) -> str:
        """The folder or URL of its checkpoints."""
        return self.kept_in or f"{self.folder}/checkpoints"

    @property
    def best(self) -> Manifest:
        """The checkpoint with the best figure by the run's rule to stop; without, the lowest loss.

        Raises:
            TrainingError: there is no checkpoint with such a figure.
        """
        path = Path(self.folder) / "run.json"
        body: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        stop = body.get("stop")
        by, mode = (stop["metric"], stop["mode"]) if stop else (BEST_BY, "min")
        found = best_of(self.checkpoints, by, mode)
        if found is None:
            raise TrainingError(f"run {self.name!r} has no checkpoint with {by!r} yet: train it")
        return found

    def evaluations(self) -> pa.Table:
        """Return a row for each evaluation made in the run; see ``lepton.train(validate=...)``.

        Columns: ``step``, ``epoch``, ``rows``, one for each figure, ``confusion`` (of a
        classifier: a list of rows, one a label), ``seconds``, ``workers``, ``time`` (UTC), and
        ``table`` (uri@version).
        """
        return evaluations.table_of(evaluations.read(Path(self.folder)))

    @property
    def attempts(self) -> list[tuple[Attempt, dict[int, list[Step]]]]:
        """Each life of the worker group with what its ranks did, by step."""
        steps = Path(self.folder) / "steps"
        return [(a, steps_of(steps, a.number)) for a in attempts_of(steps)]

    @property
    def steps(self) -> int:
        """Optimiser steps in the newest checkpoint."""
        return self.checkpoint.step

    @property
    def replayed(self) -> int:
        """Steps made again after restarts."""
        return replayed(self.attempts)

    @property
    def pauses(self) -> list[Pause]:
        """Where workers were lost, joined or left, in order."""
        made = [(a, steps) for a, steps in self.attempts if steps]
        found: list[Pause] = []
        for (a, before), (b, after) in pairwise(made):
            last, first = max(before), min(after)
            gap = min(_times(after[first])) - max(_times(before[last]))
            found.append(
                Pause(
                    step=last,
                    seconds=gap / 1e9,
                    before=a.world_size,
                    after=b.world_size,
                    replayed=max(0, last - b.step),
                )
            )
        return found

    @property
    def losses(self) -> list[float]:
        """Mean loss of each counted step."""
        counted = effective(self.attempts)
        return [loss_of(counted[n]) for n in sorted(counted)]

    def history(self) -> pa.Table:
        """Return a row for each counted step, in order.

        Columns: ``step``, ``epoch``, ``batch`` (within the epoch), ``loss`` (mean over the global
        batch), ``rows`` (of the global batch), ``workers`` and ``time`` (UTC, when it was made).
        """
        counted = effective(self.attempts)
        steps = [counted[n] for n in sorted(counted)]
        made = [min(_times(parts)) // 1000 for parts in steps]
        return pa.table(
            {
                "step": pa.array(sorted(counted), pa.int64()),
                "epoch": pa.array([parts[0].epoch for parts in steps], pa.int32()),
                "batch": pa.array([parts[0].batch for parts in steps], pa.int32()),
                "loss": pa.array([loss_of(parts) for parts in steps], pa.float64()),
                "rows": pa.array([sum(p.rows for p in parts) for parts in steps], pa.int64()),
                "workers": pa.array([len(parts) for parts in steps], pa.int32()),
                "time": pa.array(made, pa.timestamp("us", tz="UTC")),
            }
        )

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the run by step: loss, evaluations, rows/s and the workers, with each change marked.

        Args:
            path: where to save it too, such as ``run.png`` or ``run.svg``.

        Raises:
            TrainingError: matplotlib is not installed, or no step was made yet.
        """
        from lepton.training.plot import figure_of

        figure = figure_of(self)
        if path is not None:
            figure.savefig(os.fspath(path))
        return figure

    def consumption(self, stream: Stream | Mixture) -> Consumption:
        """Compare what the counted steps consumed with the plan, row by row.

        Raises:
            TrainingError: the run was not audited, so rows cannot be told apart; or the stream
                is a mixture or follows its table.
        """
        pinned = _refuse_moving(self.name, stream)
        counted = effective(self.attempts)
        rows: Counter[tuple[int, int]] = Counter()
        found = Digest()
        for step in counted.values():
            for part in step:
                if part.ids is None:
                    raise TrainingError(
                        f"run {self.name!r} kept no row identities: train with audit=True"
                    )
                found += part.digest
                rows.update((part.epoch, row) for row in part.ids)
        planned, expected = _planned(pinned, self.checkpoint.cursor)
        return Consumption(
            rows=sum(rows.values()),
            lost=len(planned - rows.keys()),
            repeated=sum(n - 1 for n in rows.values()) + len(rows.keys() - planned),
            order_hash=str(found),
            expected_hash=str(expected),
        )


def _times(step: Sequence[Step]) -> list[int]:
    return [s.time_ns for s in step if s.time_ns]


def _refuse_moving(name: str, stream: Stream | Mixture) -> Stream:
    if isinstance(stream, Stream) and not stream.follow:
        return stream
    raise TrainingError(
        f"the plan of run {name!r} is not one table version's: rows are told apart for a pinned "
        "stream of one table only"
    )


def _planned(stream: Stream, cursor: Any) -> tuple[set[tuple[int, int]], Digest]:
    """Rows and digest of the plan up to a cursor."""
    from lepton.stream import cursor_of, digest_of

    end = cursor_of(cursor)
    rows: set[tuple[int, int]] = set()
    total = Digest()
    for epoch in range(min(end.epoch + 1, stream.epochs)):
        order = stream.order(epoch)
        limit = end.rows if epoch == end.epoch else order.rows
        for unit in order.units(range(stream.lane_count)):
            slots = order.slots(unit.lane, unit.offset, unit.rows)
            ids = expected_rows(stream.source, order, unit)
            kept = slots < limit
            rows.update((epoch, int(i)) for i in ids[kept])
            total += digest_of(slots[kept], ids[kept])
    return rows, total


def next_attempt(folder: Path) -> int:
    """Return the number that a run's next generation of workers gets."""
    return max((a.number for a in attempts_of(folder / "steps")), default=-1) + 1


def run_folder(name: str, home: str | None = None) -> Path:
    """Return the folder of a run.

    Raises:
        TrainingError: the home is a URL.
    """
    try:
        return Path(home_of(home)) / "runs" / name
    except LakeError as e:
        chosen = home if home is not None else os.environ.get("LEPTON_HOME", "")
        raise TrainingError(
            f"run {name!r} cannot be kept in {chosen}: workers append to its step log at every "
            "step, which takes a file system that all nodes see. Set home= or LEPTON_HOME to a "
            f'folder of one, and keep the checkpoints there: checkpoints="{chosen.rstrip("/")}'
            '/runs". From these it can go on on another machine, too'
        ) from e


def load_run(
    name: str, home: str | None = None, storage_options: Mapping[str, str] | None = None
) -> Run:
    """Open a run by its name.

    Args:
        name: of the run.
        home: where runs are kept.
        storage_options: how to reach checkpoints on an object store; default the environment's.

    Raises:
        TrainingError: no such run; the message names those that exist.
    """
    folder = run_folder(name, home)
    path = folder / "run.json"
    if not path.is_file():
        known = sorted(p.parent.name for p in folder.parent.glob("*/run.json"))
        raise TrainingError(f"no run {name!r} in {folder.parent}; there are: {known or 'none'}")
    body = json.loads(path.read_text())
    return Run(
        name=name,
        folder=str(folder),
        trace_id=body["trace_id"],
        traceparent=body["traceparent"],
        kept_in=body.get("checkpoints", ""),
        options=dict(storage_options or {}),
    )
