"""``lepton.cross_validate``: every row is judged once, by a run that has not seen its key.

Folds are cut by :func:`lepton.preprocess.assign_split`: a key's fold is a pure function of the key,
the number of folds and the salt. Fold i has the keys that go to train at a share of (i + 1) / k and
not yet at i / k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lepton.lake import Snapshot
from lepton.preprocess import Preparation, assign_split
from lepton.stream import Mixture, Stream
from lepton.telemetry import Carrier
from lepton.training.evaluations import Judged
from lepton.training.run import Run
from lepton.training.stopping import EarlyStopping
from lepton.training.study import judged_of, spread_of, study
from lepton.training.trainer import Loop, train
from lepton.training.validation import Validation


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossValidation:
    """What the runs of a cross-validation have found.

    Attributes:
        name: of the whole.
        runs: one a fold, in order.
        judged: the evaluation of each.
        trace_id: the trace that all of them belong to.
    """

    name: str
    runs: tuple[Run, ...]
    judged: tuple[Judged, ...]
    trace_id: str

    @property
    def metrics(self) -> dict[str, float]:
        """The mean of each figure over the folds."""
        return {name: mean for name, (mean, _) in self._spread().items()}

    @property
    def deviation(self) -> dict[str, float]:
        """The sample deviation of each figure over the folds."""
        return {name: deviation for name, (_, deviation) in self._spread().items()}

    @property
    def table(self) -> pa.Table:
        """A row for each fold: ``fold``, ``run``, ``step``, ``rows`` judged, and the figures."""
        rows = [
            {"fold": i, "run": run.name, "step": j.step, "rows": j.rows, **j.metrics}
            for i, (run, j) in enumerate(zip(self.runs, self.judged, strict=True))
        ]
        return pa.Table.from_pylist(rows)

    def _spread(self) -> Mapping[str, tuple[float, float]]:
        names = self.judged[0].metrics
        return {n: spread_of([j.metrics[n] for j in self.judged]) for n in names}

    def __str__(self) -> str:
        figures = [f"{n} {mean:.4f} ± {off:.4f}" for n, (mean, off) in self._spread().items()]
        return f"{self.name}: {', '.join(figures)} over {len(self.runs)} folds"


def cross_validate(
    loop: Loop,
    stream: Stream | Mixture,
    *,
    name: str,
    key: str,
    validate: Validation,
    folds: int = 5,
    salt: str = "",
    fit: Callable[[Snapshot], Preparation] | None = None,
    stop: EarlyStopping | None = None,
    home: str | None = None,
    trace: Carrier | None = None,
    **options: Any,
) -> CrossValidation:
    """Train a run for each fold on the other folds' rows, and judge it on the fold's own.

    Runs are named ``<name>-fold-<i>``. Calling it again by the same name goes on: finished runs are
    taken as they are. The figures of a run are those of its last evaluation, or of its best one
    with ``stop``. All distinct keys are held in memory.

    Args:
        loop: as for :func:`lepton.train`.
        stream: all rows to train on; its order is made for each fold anew.
        name: of the whole.
        key: column whose equal values stay together, such as the patient and not the picture.
        validate: how to judge; of its rows each run gets its fold's.
        folds: how many.
        salt: another salt gives other folds.
        fit: makes the transform from a fold's training rows; the stream's own one was fitted on
            all of them if it was fitted at all.
        stop: when a run ends early.
        home: where runs and studies are kept.
        trace: the span to run under; default a new trace.
        options: of :func:`lepton.train`, for each run, such as ``workers``.

    Raises:
        TypeError: the stream is a mixture.
        ValueError: fewer than two folds, or a fold without keys; a key that is null somewhere.
        LakeError: no such key column.
        TrainingError: a run failed, or the name belongs to another study.
    """
    if type(folds) is not int or folds < 2:
        raise ValueError(f"folds must be a whole number from 2 on, not {folds!r}")
    if not isinstance(stream, Stream):
        raise TypeError("cross_validate takes a stream of one table: table.stream(...)")
    parts = _parts([stream.snapshot, validate.snapshot], key, folds, salt)
    asked = {
        "table": str(stream.snapshot),
        "validate": str(validate.snapshot),
        "label": validate.label,
        "key": key,
        "folds": folds,
        "salt": salt,
    }
    runs: list[Run] = []
    with study("lepton.cross_validate", name, asked, home, trace) as under:
        for i, keys in enumerate(parts):
            own = pc.field(key).isin(keys)
            rows = stream.snapshot.where(~own)
            transform = stream.transform if fit is None else fit(rows)
            chosen = replace(stream, snapshot=rows, transform=transform)
            judge = replace(validate, snapshot=validate.snapshot.where(own))
            run = train(
                loop,
                chosen,
                name=f"{name}-fold-{i}",
                validate=judge,
                stop=stop,
                home=home,
                trace=under,
                **options,
            )
            runs.append(run)
    return CrossValidation(
        name=name,
        runs=tuple(runs),
        judged=tuple(judged_of(run, stop) for run in runs),
        trace_id=under.trace_id,
    )


def _parts(snapshots: list[Snapshot], key: str, folds: int, salt: str) -> list[pa.Array[Any]]:
    """Return each fold's keys.

    Raises:
        ValueError: a fold has none.
    """
    for snapshot in snapshots:  # refuses a column that has no hash before any row is read
        assign_split(snapshot.select([key]).schema.empty_table(), key=key)
    unique: Any = pc.unique
    seen = [unique(r[key]) for s in snapshots for r in s.select([key]).batches()]
    distinct: Any = pa.table({key: unique(pa.chunked_array(seen))})
    sides = distinct
    for i in range(1, folds):
        sides = assign_split(sides, key=key, train=i / folds, column=f"{key} {i}", salt=salt)
    later = [sides[f"{key} {i}"].to_pylist() for i in range(1, folds)]
    fold = np.array([column.count("test") for column in zip(*later, strict=True)])
    found = [distinct[key].combine_chunks().filter(pa.array(fold == i)) for i in range(folds)]
    empty = [i for i, keys in enumerate(found) if not len(keys)]
    if empty:
        raise ValueError(
            f"folds {empty} of {folds} have no key: {snapshots[0]} has {len(distinct)} distinct "
            f"values of {key!r}; use fewer folds, or a finer key"
        )
    return found
