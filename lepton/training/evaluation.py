"""Evaluation: exact counts over every row, so figures add up and can be compared."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lepton import checkpoints, telemetry
from lepton.errors import TrainingError
from lepton.lake import Snapshot, home_of, write
from lepton.lake.snapshot import refuse_empty
from lepton.telemetry import Carrier
from lepton.training.run import Run

if TYPE_CHECKING:
    from lepton.checkpoints import Manifest

BATCH_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Counts of a classifier's answers on a snapshot, and what follows from them.

    Attributes:
        confusion: integer counts, shape (classes, classes): row = label, column = answer.
        table: uri@version of the rows judged. checkpoint: what was judged.
    """

    confusion: np.ndarray[Any, np.dtype[np.int64]]
    table: str
    checkpoint: str

    @property
    def rows(self) -> int:
        """Rows judged."""
        return int(self.confusion.sum())

    @property
    def metrics(self) -> dict[str, float]:
        """Accuracy, and macro averages of precision, recall and F1 over the classes present.

        A class that was never answered has precision 0, one without rows is left out of the
        averages (as scikit-learn's ``average="macro", zero_division=0`` over labels present).
        """
        hits = np.diag(self.confusion).astype(float)
        labels, answers = self.confusion.sum(axis=1), self.confusion.sum(axis=0)
        present = (labels + answers) > 0
        precision = np.divide(hits, answers, out=np.zeros_like(hits), where=answers > 0)
        recall = np.divide(hits, labels, out=np.zeros_like(hits), where=labels > 0)
        both = precision + recall
        f1 = np.divide(2 * precision * recall, both, out=np.zeros_like(hits), where=both > 0)
        return {
            "accuracy": float(hits.sum() / max(1, self.rows)),
            "precision": float(precision[present].mean()),
            "recall": float(recall[present].mean()),
            "f1": float(f1[present].mean()),
        }


def evaluate(
    subject: Run | Manifest,
    snapshot: Snapshot,
    *,
    label: str,
    home: str | None = None,
    trace: Carrier | None = None,
) -> Evaluation:
    """Judge a checkpoint's exported net on every row and append the result to ``evaluations``.

    The net's first output is taken as scores of shape (rows, classes), the label column as the
    index of the right class. The checkpoint's preparation is applied, as it is when serving.

    Args:
        subject: a run (its newest checkpoint), or one checkpoint.
        snapshot: the rows, with the label column.
        label: name of the label column.
        home: where the evaluation table is.
        trace: the span to run under.

    Raises:
        LakeError: the snapshot is empty or has no such column.
        CheckpointError: the checkpoint is damaged or has no program.
    """
    manifest = subject.checkpoint if isinstance(subject, Run) else subject
    refuse_empty(snapshot)
    snapshot.select([label])
    parent = trace or Carrier(manifest.traceparent, f"{home_of(home)}/traces")
    described = {"lepton.table": str(snapshot), "lepton.checkpoint": manifest.uri}
    with telemetry.span("lepton.evaluate", parent, attributes=described) as span:
        confusion = _count(manifest, snapshot, label)
        found = Evaluation(confusion=confusion, table=str(snapshot), checkpoint=manifest.uri)
        span.set(**{f"lepton_{k}": v for k, v in found.metrics.items()}, lepton_rows=found.rows)
        _record(found, manifest, home, span.carrier.trace_id)
    return found


def _count(manifest: Manifest, snapshot: Snapshot, label: str) -> Any:
    import torch

    from lepton.export.restore import Predictor

    predictor = Predictor(manifest)
    counts = np.zeros((0, 0), np.int64)
    for rows in snapshot.batches():
        for at in range(0, len(rows), BATCH_ROWS):
            piece = rows.slice(at, BATCH_ROWS)
            outputs = predictor(piece)
            scores = next(iter(outputs.values()))
            if scores.ndim != 2:
                raise TrainingError(
                    f"evaluation needs scores of shape (rows, classes), the net gives "
                    f"{tuple(scores.shape)}"
                )
            labels = torch.from_numpy(predictor.labels(piece, label))
            classes = max(scores.shape[1], int(labels.max()) + 1, len(counts))
            pairs = labels.to(torch.int64) * classes + scores.argmax(1)
            added = torch.bincount(pairs, minlength=classes**2).reshape(classes, classes).numpy()
            grown = np.zeros((classes, classes), np.int64)
            grown[: len(counts), : len(counts)] = counts
            counts = grown + added
    return counts


def _record(found: Evaluation, manifest: Manifest, home: str | None, trace_id: str) -> None:
    row: dict[str, Any] = {
        "id": uuid.uuid4().hex,
        "time": pa.scalar(time.time_ns() // 1000, pa.timestamp("us", tz="UTC")),
        "run": str(manifest.lineage.get("run", "")),
        "step": manifest.step,
        "checkpoint": manifest.uri,
        "table": found.table,
        "rows": found.rows,
        **found.metrics,
        "confusion": json.dumps(found.confusion.tolist()),
        "trace_id": trace_id,
    }
    write(pa.table({k: pa.array([v]) for k, v in row.items()}), f"{home_of(home)}/evaluations")


__all__ = ["Evaluation", "checkpoints", "evaluate"]
