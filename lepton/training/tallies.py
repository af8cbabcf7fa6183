"""What an evaluation adds up, so that its figures do not depend on who judged which rows. Pure.

Counts of a classifier are whole numbers and add up exactly. For a regression, sums of errors and
the labels' mean and spread are kept as 64-bit floats, and two tallies' spreads are combined as
Chan, Golub and LeVeque (1983) have it, so that r2 does not suffer from a large mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lepton.errors import TrainingError

Task = Literal["classification", "regression"]
Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]

METRICS: Mapping[Task, tuple[str, ...]] = {
    "classification": ("accuracy", "precision", "recall", "f1"),
    "regression": ("mse", "mae", "r2"),
}
"""What is always worked out."""


@dataclass(frozen=True, eq=False)
class Classes:
    """A classifier's answers, counted.

    Attributes:
        confusion: shape (classes, classes): row = label, column = answer.
    """

    confusion: Ints

    @staticmethod
    def of(scores: Floats, labels: Any, where: str) -> Classes:
        """Count the answers of some rows.

        Args:
            scores: shape (rows, classes).
            labels: index of the right class, shape (rows,); floats if they are whole.
            where: what is judged on what, for messages.

        Raises:
            TrainingError: the scores or the labels are not such.
        """
        if scores.ndim != 2:
            raise TrainingError(
                f"{where}: evaluation needs scores of shape (rows, classes), the net gives "
                f"{tuple(scores.shape)}; for a label that is measured give it as a float, or pass "
                "predict= with a function that returns such scores"
            )
        indices = np.asarray(labels)
        if indices.dtype.kind == "f" and (indices == np.floor(indices)).all():
            indices = indices.astype(np.int64)
        if indices.shape != scores.shape[:1] or indices.dtype.kind not in "iub":
            raise TrainingError(
                f"{where}: evaluation needs one whole number a row as the label, it is "
                f"{indices.dtype} of shape {indices.shape}"
            )
        if len(indices) and indices.min() < 0:
            raise TrainingError(
                f"{where}: label {int(indices.min())} is no class, these begin at 0: filter such "
                "rows out"
            )
        indices = indices.astype(np.int64)
        size = max(scores.shape[1], int(indices.max(initial=0)) + 1)
        pairs = indices * size + scores.argmax(1)
        return Classes(np.bincount(pairs, minlength=size**2).reshape(size, size).astype(np.int64))

    def __add__(self, other: Classes) -> Classes:
        size = max(len(self.confusion), len(other.confusion))
        total = np.zeros((size, size), np.int64)
        for part in (self.confusion, other.confusion):
            total[: len(part), : len(part)] += part
        return Classes(total)

    @property
    def rows(self) -> int:
        """Rows judged."""
        return int(self.confusion.sum())

    @property
    def per_class(self) -> list[dict[str, float]]:
        """Precision, recall, F1 and rows of each class; a figure without rows behind it is 0."""
        hits = np.diag(self.confusion).astype(float)
        labels, answers = self.confusion.sum(axis=1), self.confusion.sum(axis=0)
        precision = np.divide(hits, answers, out=np.zeros_like(hits), where=answers > 0)
        recall = np.divide(hits, labels, out=np.zeros_like(hits), where=labels > 0)
        both = precision + recall
        f1 = np.divide(2 * precision * recall, both, out=np.zeros_like(hits), where=both > 0)
        return [
            {"precision": float(p), "recall": float(r), "f1": float(f), "rows": int(n)}
            for p, r, f, n in zip(precision, recall, f1, labels, strict=True)
        ]

    @property
    def metrics(self) -> dict[str, float]:
        """Accuracy, and macro averages of precision, recall and F1 over the classes present.

        A class that was never answered has precision 0, one without rows is left out of the
        averages (as scikit-learn's ``average="macro", zero_division=0`` over labels present).
        """
        touched = (self.confusion.sum(axis=1) + self.confusion.sum(axis=0)) > 0
        present = [c for c, seen in zip(self.per_class, touched, strict=True) if seen]
        accuracy = float(np.diag(self.confusion).sum() / max(1, self.rows))
        means = {
            name: float(np.mean([c[name] for c in present])) if present else 0.0
            for name in ("precision", "recall", "f1")
        }
        return {"accuracy": accuracy, **means}


@dataclass(frozen=True, eq=False)
class Errors:
    """A regression's errors, summed.

    Attributes:
        rows: how many.
        squared, absolute: sums of the errors, for each output.
        mean, spread: of the labels, for each output: their mean, and the sum of the squares of
            their distances from it.
    """

    rows: int
    squared: Floats
    absolute: Floats
    mean: Floats
    spread: Floats

    @staticmethod
    def of(scores: Floats, labels: Any, where: str) -> Errors:
        """Sum the errors of some rows.

        Args:
            scores: shape (rows,), (rows, 1) or (rows, outputs).
            labels: shape (rows,) or (rows, outputs).
            where: what is judged on what, for messages.

        Raises:
            TrainingError: the shapes do not go together.
        """
        truth = np.asarray(labels, np.float64)
        given = np.asarray(scores, np.float64)
        truth, given = (a[:, None] if a.ndim == 1 else a for a in (truth, given))
        if truth.shape != given.shape or truth.ndim != 2:
            raise TrainingError(
                f"{where}: labels of shape {np.shape(labels)} cannot be held against answers of "
                f"shape {np.shape(scores)}: they must be alike, (rows,) or (rows, outputs)"
            )
        apart = given - truth
        mean = truth.mean(axis=0) if len(truth) else np.zeros(truth.shape[1])
        return Errors(
            rows=len(truth),
            squared=(apart**2).sum(axis=0),
            absolute=np.abs(apart).sum(axis=0),
            mean=mean,
            spread=((truth - mean) ** 2).sum(axis=0),
        )

    def __add__(self, other: Errors) -> Errors:
        if not self.rows or not other.rows:
            return self if self.rows else other
        rows = self.rows + other.rows
        apart = other.mean - self.mean
        return Errors(
            rows=rows,
            squared=self.squared + other.squared,
            absolute=self.absolute + other.absolute,
            mean=self.mean + apart * (other.rows / rows),
            spread=self.spread + other.spread + apart**2 * (self.rows * other.rows / rows),
        )

    @property
    def metrics(self) -> dict[str, float]:
        """Mean squared and absolute error and r2, each averaged over the outputs.

        Where the labels do not differ, r2 is 1 without an error and 0 with one (as scikit-learn's
        ``force_finite``).
        """
        flat = self.spread == 0
        share = np.divide(self.squared, self.spread, out=np.zeros_like(self.spread), where=~flat)
        r2 = np.where(flat, np.where(self.squared == 0, 1.0, 0.0), 1 - share)
        rows = max(1, self.rows)
        return {
            "mse": float(self.squared.mean() / rows),
            "mae": float(self.absolute.mean() / rows),
            "r2": float(r2.mean()),
        }


Tally = Classes | Errors


def tally_of(task: Task, scores: Floats, labels: Any, where: str) -> Tally:
    """Judge some rows.

    Raises:
        TrainingError: scores and labels do not go together.
    """
    kind = Classes if task == "classification" else Errors
    return kind.of(scores, labels, where)


def total_of(parts: Sequence[Tally]) -> Tally:
    """Add tallies of one kind up."""
    total: Any = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
