"""What a run is judged by while it goes on, settled and checked before it begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import pyarrow as pa

from lepton.errors import TrainingError
from lepton.lake import Snapshot
from lepton.lake.snapshot import refuse_empty
from lepton.stream import Mixture, Stream
from lepton.training.stopping import EarlyStopping
from lepton.training.tallies import METRICS, Task

Predict = Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
"""From what is attached, by name, and a batch to scores: see :class:`Validation`."""
Measure = Callable[[Any, Any], float]
"""From all labels and all scores to a figure, as scikit-learn's functions take them."""


@dataclass(frozen=True, slots=True)
class Validation:
    """Judge a run's net on other rows, every so many steps and after the last one.

    The rows are those of a pinned snapshot, through the training stream's transform, in their
    order, each once: the ranks share them. Figures are the same at any number of workers, and a
    worker that is lost meanwhile costs that evaluation's time alone.

    Attributes:
        snapshot: the rows; with the columns that the loop trains on.
        label: the column with the right answer.
        every: steps from one evaluation to the next.
        task: ``"classification"`` (the label is the index of a class, scores have the shape (rows,
            classes)) or ``"regression"`` (shape (rows,) or (rows, outputs)); default by the
            label's type.
        predict: from the attached things, by name, and a batch to scores. Default: the net that
            the training batches go through, in evaluation mode, its first output if it has more.
            Where nets are sharded it is asked for batches without rows, too: all ranks call alike.
        metrics: further figures by name, each a function of all labels and all scores as NumPy
            arrays, in the rows' order, such as ``sklearn.metrics.log_loss``: every rank holds
            these arrays then.
        batch_size: rows judged at once, over all ranks together.

    Raises:
        ValueError: an option that cannot be.
    """

    snapshot: Snapshot
    _: KW_ONLY
    label: str
    every: int = 100
    task: Task | None = None
    predict: Predict | None = None
    metrics: Mapping[str, Measure] = field(default_factory=dict[str, Measure])
    batch_size: int = 4096

    def __post_init__(self) -> None:
        for name in ("every", "batch_size"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number from 1 on")
        if self.task not in (None, *METRICS):
            raise ValueError(f"task must be one of {list(METRICS)}, not {self.task!r}")
        taken = {m for names in METRICS.values() for m in names} & set(self.metrics)
        if taken or not all(callable(m) for m in self.metrics.values()):
            raise ValueError(
                f"metrics= takes functions of (labels, scores) by names other than {METRICS}"
            )

    def settled(self, training: Stream | Mixture) -> Settled:
        """Return what workers are told, for a run on a stream.

        Raises:
            LakeError: the snapshot is empty, or lacks a column that training has.
            TrainingError: there is no such label once the transform has been applied.
        """
        refuse_empty(self.snapshot)
        wanted = list(training.snapshot.schema.names)
        if self.label not in wanted and self.label in self.snapshot.load().schema.names:
            wanted.append(self.label)
        rows = self.snapshot.select(wanted).stream(
            batch_size=max(self.batch_size, training.lane_count),
            shuffle=False,
            lanes=training.lane_count,
            engine="worker",
            transform=training.transform,
        )
        schema: pa.Schema = rows.schema
        if self.label not in schema.names:
            raise TrainingError(
                f"the rows of {self.snapshot} have no label {self.label!r} after the stream's "
                f"transform; they have: {', '.join(schema.names)}"
            )
        return Settled(self, rows, self.task or _task_of(schema.field(self.label).type))


@dataclass(frozen=True, slots=True)
class Settled:
    """A validation, checked.

    Attributes:
        validation: what was asked for.
        rows: where the rows come from.
        task: what the label asks for.
    """

    validation: Validation
    rows: Stream
    task: Task

    @property
    def names(self) -> tuple[str, ...]:
        """The figures there will be."""
        return (*METRICS[self.task], *self.validation.metrics)

    def check(self, stop: EarlyStopping | None) -> None:
        """Refuse a rule about a figure that there will not be.

        Raises:
            ValueError: so it is.
        """
        if stop is not None and stop.metric not in self.names:
            raise ValueError(
                f"stop=EarlyStopping({stop.metric!r}): a {self.task} by {self.validation.label!r} "
                f"has the figures {', '.join(self.names)}; further ones can be given by "
                "Validation(metrics=...)"
            )


def _task_of(kind: Any) -> Task:
    inner = getattr(kind, "value_type", kind)
    return "regression" if pa.types.is_floating(inner) else "classification"
