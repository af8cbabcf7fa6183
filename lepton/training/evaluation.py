"""Evaluation after training: exact counts over every row of a snapshot, kept in a table."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lepton import checkpoints, telemetry
from lepton.lake import Snapshot, home_of, write
from lepton.lake.snapshot import refuse_empty
from lepton.telemetry import Carrier
from lepton.training.run import Run
from lepton.training.tallies import METRICS, Classes, Ints, Tally, Task, tally_of, total_of

if TYPE_CHECKING:
    from lepton.checkpoints import Manifest

BATCH_ROWS = 4096
_FIGURES = [m for names in METRICS.values() for m in names]  # a column each, whatever the task


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A net's answers on a snapshot, held against the labels.

    Attributes:
        tally: what was counted.
        table: uri@version of the rows judged.
        checkpoint: what was judged.
    """

    tally: Tally
    table: str
    checkpoint: str

    @property
    def confusion(self) -> Ints:
        """Counts, shape (classes, classes): row = label, column = answer; empty if it has none."""
        return self.tally.confusion if isinstance(self.tally, Classes) else np.zeros((0, 0), int)

    @property
    def per_class(self) -> list[dict[str, float]]:
        """Precision, recall, F1 and rows of each class."""
        return self.tally.per_class if isinstance(self.tally, Classes) else []

    @property
    def rows(self) -> int:
        """Rows judged."""
        return self.tally.rows

    @property
    def metrics(self) -> dict[str, float]:
        """Of a classifier accuracy, precision, recall and f1; of a regression mse, mae and r2."""
        return self.tally.metrics


def evaluate(
    subject: Run | Manifest,
    snapshot: Snapshot,
    *,
    label: str,
    home: str | None = None,
    trace: Carrier | None = None,
) -> Evaluation:
    """Judge a checkpoint's exported net on every row and append the result to ``evaluations``.

    The checkpoint's preparation is applied, as it is when serving. A label of whole numbers is the
    index of the right class, the net's first output then scores of shape (rows, classes); with a
    label of fractions the first output is held against it, shape (rows,) or (rows, outputs).

    Args:
        subject: a run (its newest checkpoint), or one checkpoint.
        snapshot: the rows, with the label column.
        label: name of the label column.
        home: where the evaluation table is.
        trace: the span to run under.

    Raises:
        LakeError: the snapshot is empty or has no such column.
        CheckpointError: the checkpoint is damaged or has no program.
        TrainingError: the net's answers and the labels do not go together.
    """
    manifest = subject.checkpoint if isinstance(subject, Run) else subject
    refuse_empty(snapshot)
    snapshot.select([label])
    parent = trace or Carrier(manifest.traceparent, f"{home_of(home)}/traces")
    described = {"lepton.table": str(snapshot), "lepton.checkpoint": manifest.uri}
    links = [manifest.traceparent] if manifest.traceparent != parent.traceparent else []
    with telemetry.span("lepton.evaluate", parent, attributes=described, links=links) as span:
        tally = _judge(manifest, snapshot, label)
        found = Evaluation(tally=tally, table=str(snapshot), checkpoint=manifest.uri)
        span.set(**{f"lepton_{k}": v for k, v in found.metrics.items()}, lepton_rows=found.rows)
        _record(found, manifest, home, span.carrier.trace_id)
    return found


def _task_of(labels: Any, scores: Any) -> Task:
    """Fractions ask for a regression, unless several scores a row can only be a classifier's."""
    many = scores.ndim == 2 and scores.shape[1] > 1
    alone = labels.dtype.kind == "f" and not (labels.ndim == 1 and many)
    return "regression" if alone else "classification"


def _judge(manifest: Manifest, snapshot: Snapshot, label: str) -> Tally:
    from lepton.export.restore import Predictor

    predictor = Predictor(manifest)
    where = f"checkpoint {manifest.uri} on {snapshot}"
    tallies: list[Tally] = []
    for rows in snapshot.batches():
        for at in range(0, len(rows), BATCH_ROWS):
            piece = rows.slice(at, BATCH_ROWS)
            scores = next(iter(predictor(piece).values())).float().numpy()
            labels = predictor.labels(piece, label)
            tallies.append(tally_of(_task_of(labels, scores), scores, labels, where))
    return total_of(tallies)


def _record(found: Evaluation, manifest: Manifest, home: str | None, trace_id: str) -> None:
    row: dict[str, Any] = {
        "id": uuid.uuid4().hex,
        "time": pa.scalar(time.time_ns() // 1000, pa.timestamp("us", tz="UTC")),
        "run": str(manifest.lineage.get("run", "")),
        "step": manifest.step,
        "checkpoint": manifest.uri,
        "table": found.table,
        "rows": found.rows,
        **{m: pa.scalar(found.metrics.get(m), pa.float64()) for m in _FIGURES},
        "confusion": json.dumps(found.confusion.tolist()),
        "trace_id": trace_id,
    }
    table = pa.table({k: pa.array([v]) for k, v in row.items()})
    write(table, f"{home_of(home)}/evaluations", evolve="add")


__all__ = ["Evaluation", "checkpoints", "evaluate"]
