"""The evaluations of a run, in its folder: one JSON line each.

A run that goes on from a checkpoint makes some of them again: the last line about a step counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

NAME = "evaluations.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """One evaluation.

    Attributes:
        step: optimiser steps made before.
        epoch: in which that was.
        rows: how many were judged.
        metrics: its figures, by name.
        confusion: counts by label and answer, of a classifier; None elsewhere.
        seconds: how long it took.
        world_size: workers that shared the rows.
        time_ns: when it ended, Unix nanoseconds.
        table: uri@version of the rows.
    """

    step: int
    epoch: int
    rows: int
    metrics: dict[str, float]
    confusion: list[list[int]] | None
    seconds: float
    world_size: int
    time_ns: int
    table: str

    def brief(self) -> Judged:
        """Return the same without the confusion matrix."""
        return replace(self, confusion=None)


def append(folder: Path, judged: Judged) -> None:
    """Add an evaluation to a run's; a line that a killed process left unfinished stays alone."""
    path = folder / NAME
    torn = path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size
    line = ("\n" if torn else "") + json.dumps(asdict(judged)) + "\n"
    file = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def read(folder: Path) -> list[Judged]:
    """Return a run's evaluations, by step; unfinished lines are left out."""
    path = folder / NAME
    found: dict[int, Judged] = {}
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else []:
        try:
            judged = Judged(**json.loads(line))
        except (ValueError, TypeError):
            continue
        found[judged.step] = judged
    return [found[step] for step in sorted(found)]


def table_of(evaluations: Sequence[Judged]) -> pa.Table:
    """Return a row for each evaluation, by step.

    Columns: ``step``, ``epoch``, ``rows``, one for each figure, ``confusion`` (of a classifier: a
    list of rows, one a label), ``seconds``, ``workers``, ``time`` (UTC) and ``table``.
    """
    names = list(dict.fromkeys(n for e in evaluations for n in e.metrics))
    columns: dict[str, Any] = {
        "step": pa.array([e.step for e in evaluations], pa.int64()),
        "epoch": pa.array([e.epoch for e in evaluations], pa.int32()),
        "rows": pa.array([e.rows for e in evaluations], pa.int64()),
        **{n: pa.array([e.metrics.get(n) for e in evaluations], pa.float64()) for n in names},
        "confusion": pa.array([e.confusion for e in evaluations], pa.list_(pa.list_(pa.int64()))),
        "seconds": pa.array([e.seconds for e in evaluations], pa.float64()),
        "workers": pa.array([e.world_size for e in evaluations], pa.int32()),
        "time": pa.array([e.time_ns // 1000 for e in evaluations], pa.timestamp("us", tz="UTC")),
        "table": pa.array([e.table for e in evaluations], pa.string()),
    }
    return pa.table(columns)
