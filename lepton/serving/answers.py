"""The inference log's writing end: every answer becomes a row of a Delta table.

Answers wait in memory and go out in one commit a second at most. A failed commit is tried again
with the next; only a killed replica loses what it had not yet committed (at most a second).
Requests themselves never wait for the lake.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from lepton import telemetry
from lepton.errors import LakeError
from lepton.lake import write

FLUSH_S = 0.5
MAX_WAITING = 100_000

log = logging.getLogger("lepton")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One request as it was answered; a table row for each of its rows.

    Attributes:
        rows: the raw inputs, or None if the request failed.
        outputs: by name, arrays with a leading row dimension.
        variant: ``champion`` or ``canary``.
    """

    request_id: str
    time_us: int
    version: int
    variant: str
    status: int
    trace_id: str
    latency_ms: float
    rows: pa.Table | None
    outputs: Mapping[str, np.ndarray[Any, Any]]


class AnswerLog:
    """Collects answers and commits them in the background."""

    def __init__(self, uri: str, model: str) -> None:
        self._uri = uri
        self._model = model
        self._waiting: list[Answer] = []
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="lepton-answers")
        self._thread.start()
        self._unwatch = telemetry.watch(
            "lepton.answers.waiting", lambda: len(self._waiting), {"lepton.model": model}
        )

    def add(self, answer: Answer) -> None:
        """Take an answer; beyond :data:`MAX_WAITING` the oldest are dropped with a warning."""
        with self._lock:
            self._waiting.append(answer)
            if len(self._waiting) > MAX_WAITING:
                del self._waiting[0]
                telemetry.measure("lepton.answers.dropped", 1, {"lepton.model": self._model})
                log.warning(
                    "inference log of %s: dropped an answer, the lake is behind", self._model
                )

    def flush(self) -> None:
        """Commit everything that waits."""
        with self._flushing:
            with self._lock:
                answers, self._waiting = self._waiting, []
            if not answers:
                return
            try:
                write(_table(answers, self._model), self._uri)
            except LakeError as e:
                log.warning("inference log of %s: %s; will try again", self._model, e)
                with self._lock:
                    self._waiting = answers + self._waiting

    def close(self) -> None:
        """Commit what waits and stop."""
        self._unwatch()
        self._stop.set()
        self._thread.join()
        self.flush()

    def _run(self) -> None:
        while not self._stop.wait(FLUSH_S):
            self.flush()


def _table(answers: Sequence[Answer], model: str) -> pa.Table:
    """One row per row of every answer; failed requests have null inputs and answers."""
    parts = [_rows(a, model) for a in answers]
    return pa.concat_tables(parts, promote_options="default")


def _rows(answer: Answer, model: str) -> pa.Table:
    count = len(answer.rows) if answer.rows is not None else 1
    fixed: dict[str, Any] = {
        "request_id": pa.repeat(answer.request_id, count),
        "row": pa.array(np.arange(count), pa.int32()),
        "time": pa.array([answer.time_us] * count, pa.timestamp("us", tz="UTC")),
        "model": pa.repeat(model, count),
        "version": pa.array([answer.version] * count, pa.int64()),
        "variant": pa.repeat(answer.variant, count),
        "status": pa.array([answer.status] * count, pa.int32()),
        "trace_id": pa.repeat(answer.trace_id, count),
        "latency_ms": pa.array([answer.latency_ms] * count, pa.float64()),
    }
    if answer.rows is not None:
        for name in answer.rows.column_names:
            fixed[name] = _listed(answer.rows.column(name).combine_chunks())
    for name, values in answer.outputs.items():
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        width = values.size // count
        fixed[f"answer_{name}"] = (
            flat if values.ndim == 1 else _listed(pa.FixedSizeListArray.from_arrays(flat, width))
        )
    return pa.table(fixed)


def _listed(array: Any) -> Any:
    """Delta has lists of any length only."""
    if pa.types.is_fixed_size_list(array.type):
        return array.cast(pa.list_(array.type.value_type))
    return array
