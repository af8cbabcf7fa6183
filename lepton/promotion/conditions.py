"""Gates that look at more than metrics: the champion on the same rows, the data, anything.

A gate may be any function that takes a :class:`Candidate` and returns whether it passed, or a
:class:`lepton.promotion.gates.GateResult` that says more. Here are some made ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lepton import checkpoints
from lepton.errors import GateError
from lepton.export.restore import Predictor
from lepton.lake import Snapshot, table
from lepton.promotion.gates import GateResult
from lepton.promotion.significance import chance_of
from lepton.registry import ModelVersion

BATCH_ROWS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """Who wants to be promoted, and the champion, if there is one."""

    version: ModelVersion
    champion: ModelVersion | None


Condition = Callable[[Candidate], "bool | GateResult"]


def beats(snapshot: Snapshot, *, label: str, p: float = 0.05) -> Condition:
    """Return a gate: the candidate is right more often than the champion, by more than chance.

    Both answer the same rows; a first version passes.

    Args:
        snapshot: the rows, with the label column.
        label: the column with the index of the right class.
        p: probability below which chance is ruled out.

    Raises:
        ValueError: p is not between 0 and 1.
    """
    _check(p)
    snapshot.select([label])

    def gate(candidate: Candidate) -> GateResult:
        named = f"beats the champion on {snapshot} (p < {p:g})"
        if candidate.champion is None:
            return GateResult(named, True, (f"{named}: passed, no champion yet",))
        only, other, rows = compared(candidate.version, candidate.champion, snapshot, label)
        found = chance_of(only, other)
        return _told(named, found < p, only, other, rows, found)

    return gate


def not_worse(snapshot: Snapshot, *, label: str, p: float = 0.05) -> Condition:
    """Return a gate: the champion is not right more often by more than chance; as :func:`beats`."""
    _check(p)
    snapshot.select([label])

    def gate(candidate: Candidate) -> GateResult:
        named = f"is no worse than the champion on {snapshot} (p < {p:g})"
        if candidate.champion is None:
            return GateResult(named, True, (f"{named}: passed, no champion yet",))
        only, other, rows = compared(candidate.version, candidate.champion, snapshot, label)
        found = chance_of(other, only)
        return _told(named, found >= p, only, other, rows, found)

    return gate


def rows_hold(condition: str, *, on: Snapshot | None = None, at_most: float = 0.0) -> Condition:
    """Return a gate on data: of its rows, no more than a share break a condition.

    Args:
        condition: SQL-like, as :meth:`lepton.Snapshot.where` takes it. A null breaks it.
        on: the rows; default those that the candidate was trained on.
        at_most: share of the rows that may break it, in [0, 1].

    Raises:
        ValueError: the share is not in [0, 1].
        LakeError: the condition does not parse, or names an unknown column.
    """
    if not 0 <= at_most <= 1:
        raise ValueError(f"at_most={at_most!r} must be a share between 0 and 1")
    if on is not None:
        on.where(condition)

    def gate(candidate: Candidate) -> GateResult:
        rows = on if on is not None else _trained_on(candidate.version)
        total = rows.count_rows()
        broken = total - rows.where(condition).count_rows()
        named = f"rows of {rows} hold: {condition}"
        passed = total > 0 and broken <= at_most * total
        end = "passed" if passed else "failed"
        allowed = f", allowed {at_most:g} of them" if at_most else ""
        detail = f"{named}: {broken} of {total} rows break it{allowed}: {end}"
        return GateResult(named, passed, (detail,))

    return gate


def compared(
    one: ModelVersion, other: ModelVersion, snapshot: Snapshot, label: str
) -> tuple[int, int, int]:
    """Have two versions answer the same rows.

    Returns:
        Rows that only the first answered rightly, rows that only the second did, and all rows.

    Raises:
        GateError: one does not give scores of shape (rows, classes).
        CheckpointError: one cannot be loaded.
    """
    first, second = (Predictor(checkpoints.load(v.checkpoint)) for v in (one, other))
    only = others = total = 0
    for batch in snapshot.batches():
        for at in range(0, len(batch), BATCH_ROWS):
            rows = batch.slice(at, BATCH_ROWS)
            # labels as each saw them: their preparations may differ
            a = _answers(first, rows, one) == first.labels(rows, label)
            b = _answers(second, rows, other) == second.labels(rows, label)
            only += int(np.count_nonzero(a & ~b))
            others += int(np.count_nonzero(b & ~a))
            total += len(rows)
    return only, others, total


def _answers(predictor: Predictor, rows: Any, entry: ModelVersion) -> Any:
    scores = next(iter(predictor(rows).values()))
    if scores.ndim != 2:
        raise GateError(
            f"{entry.model} version {entry.version} gives {tuple(scores.shape)}: comparing by "
            "label needs scores of shape (rows, classes)"
        )
    return scores.argmax(1).numpy()


def _told(named: str, passed: bool, only: int, other: int, rows: int, chance: float) -> GateResult:
    end = "passed" if passed else "failed"
    detail = (
        f"{named}: of {rows} rows only the candidate was right in {only}, only the champion in "
        f"{other}; by chance {chance:.3g}: {end}"
    )
    return GateResult(named, passed, (detail,))


def _check(p: float) -> None:
    if not 0 < p < 1:
        raise ValueError(f"p={p!r} must be a probability between 0 and 1, such as 0.05")


def _trained_on(entry: ModelVersion) -> Snapshot:
    uri, version = entry.lineage.get("table"), entry.lineage.get("table_version")
    if not uri or not isinstance(version, int):
        raise GateError(
            f"{entry.model} version {entry.version} does not say which table it was trained on: "
            "name the rows with on="
        )
    return table(str(uri), version=version)
