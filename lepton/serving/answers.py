"""The inference log's writing end: every answer becomes a row of a Delta table.

Answers wait in memory and go out in one commit every :data:`FLUSH_S` seconds at most. A failed
commit is tried again, less and less often; what waits is bounded, and beyond the bound the oldest
are dropped, counted and told. A killed replica loses what it had not yet committed. Requests
themselves never wait for the lake.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
from deltalake import DeltaTable

from lepton import telemetry
from lepton.errors import LakeError
from lepton.lake import table, write
from lepton.serving.arrays import Arrays
from lepton.serving.pages import Page, Place, columns_in, form_of, listed, placed

FLUSH_S = 0.9
MOST_ANSWERS = 100_000
MOST_BYTES = 256 * 2**20
LONGEST_PAUSE_S = 30.0

log = logging.getLogger("lepton")


@dataclass(kw_only=True, slots=True)
class Answer:
    """One request as it was answered; a table row for each of its rows.

    The log that takes it may put its inputs and outputs elsewhere.

    Attributes:
        rows: the raw inputs, or None if the request failed.
        outputs: by name, arrays with a leading row dimension.
        variant: ``champion`` or ``canary``.
        given_bytes: of the request's body.
        place: where inputs and outputs are instead.
    """

    request_id: str
    time_us: int
    version: int
    variant: str
    status: int
    trace_id: str
    latency_ms: float
    rows: pa.Table | Arrays | None
    outputs: Mapping[str, np.ndarray[Any, Any]]
    given_bytes: int = 0
    place: Place | None = None

    @property
    def count(self) -> int:
        """Rows in the log."""
        if self.place is not None:
            return self.place.count
        return len(self.rows) if self.rows is not None else 1

    @property
    def size(self) -> int:
        """Bytes it holds, of what can be large; inputs as they came over the network."""
        if self.place is not None:
            return self.place.size
        return self.given_bytes + sum(values.nbytes for values in self.outputs.values())

    @property
    def form(self) -> Any:
        """Answers of equal form can be put together."""
        if self.place is not None:
            return self.place.page.form
        schema = self.rows.schema if isinstance(self.rows, pa.Table) else None
        return schema, form_of(self.outputs)


class AnswerLog:
    """Collects answers and commits them in the background.

    Attributes:
        dropped: answers that were lost because the lake was behind.
    """

    def __init__(self, uri: str, model: str) -> None:
        self.dropped = 0
        self._uri = uri
        self._model = model
        self._waiting: deque[Answer] = deque()
        self._pages: dict[Any, Page] = {}
        self._bytes = 0
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._stop = threading.Event()
        self._pause_s = FLUSH_S
        self._schema: pa.Schema | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="lepton-answers")
        self._thread.start()
        self._unwatch = telemetry.watch(
            "lepton.answers.waiting", lambda: len(self._waiting), {"lepton.model": model}
        )

    def add(self, answer: Answer) -> None:
        """Take an answer; the oldest are dropped beyond the bounds."""
        with self._lock:
            if isinstance(answer.rows, Arrays):
                self._put(answer, answer.rows)
            self._waiting.append(answer)
            self._bytes += answer.size
            self._bound()

    def _put(self, answer: Answer, rows: Arrays) -> None:
        """Take the arrays out of an answer."""
        answer.place = placed(rows, answer.outputs, self._pages)
        if answer.place is None:
            answer.rows = rows.table()
        else:
            answer.rows, answer.outputs = None, {}

    def flush(self) -> bool:
        """Commit everything that waits; return whether the lake took it.

        Answers of different forms go out together; if the lake refuses that, each form by itself,
        so that one that does not fit the table holds up no other.
        """
        with self._flushing:
            with self._lock:
                answers, self._waiting, self._bytes = self._waiting, deque(), 0
                self._pages = {}
            if not answers or self._committed(answers) is None:
                self._pause_s = FLUSH_S
                return True
            kept: list[Answer] = []
            why: Exception | None = None
            for group in _alike(answers):
                refused = self._committed(group)
                if refused is not None:
                    kept += group
                    why = refused
            return self._keep(kept, why)

    def _committed(self, answers: Iterable[Answer]) -> Exception | None:
        """Commit; return why it could not be."""
        try:
            rows = _table(answers, self._model)
            if self._schema is None and DeltaTable.is_deltatable(self._uri):
                self._schema = table(self._uri).schema
            known = self._schema or rows.schema
            for field in cast("list[Any]", list(known)):
                if field.name not in rows.schema.names:
                    rows = rows.append_column(field, _nulls(len(rows), field.type))
            grown = set(rows.schema.names) - set(known.names)
            self._schema = write(rows, self._uri, evolve="add" if grown else None).schema
        except (LakeError, OSError, pa.ArrowException, ValueError) as e:
            self._schema = None  # somebody else may have changed the table
            return e
        return None

    def _keep(self, answers: Sequence[Answer], why: Exception | None) -> bool:
        """Keep for later what the lake did not take, and say so."""
        if not answers:
            return True
        with self._lock:
            self._waiting.extendleft(reversed(answers))
            self._bytes += sum(a.size for a in answers)
            self._bound()
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        log.warning(
            "inference log of %s: %s; %d answers wait, trying again in %.0f s, %d were dropped so "
            "far",
            *(self._model, why, len(self._waiting), self._pause_s, self.dropped),
        )
        return False

    def close(self) -> None:
        """Commit what waits and stop."""
        self._unwatch()
        self._stop.set()
        self._thread.join()
        self.flush()

    def _bound(self) -> None:
        while len(self._waiting) > MOST_ANSWERS or self._bytes > MOST_BYTES:
            self._bytes -= self._waiting.popleft().size
            self.dropped += 1
            telemetry.measure("lepton.answers.dropped", 1, {"lepton.model": self._model})

    def _run(self) -> None:
        while not self._stop.wait(self._pause_s):
            self.flush()


def _alike(answers: Iterable[Answer]) -> list[list[Answer]]:
    """Answers of one form each."""
    forms: dict[Any, list[Answer]] = {}
    for answer in answers:
        forms.setdefault(answer.form, []).append(answer)
    return list(forms.values())


def _table(answers: Iterable[Answer], model: str) -> pa.Table:
    """One row per row of every answer; failed requests have null inputs and answers."""
    parts = [_rows(group, model) for group in _alike(answers)]
    return pa.concat_tables(parts, promote_options="default")


def _rows(answers: Sequence[Answer], model: str) -> pa.Table:
    """The rows of answers of one form: whole columns at once, whatever the number of requests."""
    counts = np.array([a.count for a in answers])
    which = np.repeat(np.arange(len(answers)), counts)
    starts = np.cumsum(counts) - counts
    places: Any = pa.array(which)

    def each(values: Any, kind: pa.DataType) -> Any:
        return pa.array(values, kind).take(places)

    numbers: Any = np.arange(len(which)) - starts[which]
    fixed: dict[str, Any] = {
        "request_id": each([a.request_id for a in answers], pa.string()),
        "row": pa.array(numbers, pa.int32()),
        "time": each([a.time_us for a in answers], pa.timestamp("us", tz="UTC")),
        "model": pa.repeat(model, int(counts.sum())),
        "version": each([a.version for a in answers], pa.int64()),
        "variant": each([a.variant for a in answers], pa.string()),
        "status": each([a.status for a in answers], pa.int32()),
        "trace_id": each([a.trace_id for a in answers], pa.string()),
        "latency_ms": each([a.latency_ms for a in answers], pa.float64()),
    }
    if answers[0].place is not None:
        return pa.table({**fixed, **columns_in([a.place for a in answers if a.place])})
    tables = [a.rows for a in answers if isinstance(a.rows, pa.Table)]
    inputs = pa.concat_tables(tables) if tables else None
    if inputs is not None:
        for name in inputs.column_names:
            fixed[name] = listed(inputs.column(name).combine_chunks())
    outputs = answers[0].outputs
    fixed |= columns_of_answers(
        {name: np.concatenate([a.outputs[name] for a in answers]) for name in outputs}
    )
    return pa.table(fixed)


def columns_of_answers(outputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    """Return outputs, arrays of shape (rows, …), as columns ``answer_<output>``."""
    columns: dict[str, Any] = {}
    for name, values in outputs.items():
        flat = _array(np.ascontiguousarray(values).reshape(-1))
        width = values.size // len(values) if len(values) else 1
        columns[f"answer_{name}"] = (
            flat if values.ndim == 1 else listed(pa.FixedSizeListArray.from_arrays(flat, width))
        )
    return columns


def _array(values: Any) -> Any:
    return pa.array(values)


def _nulls(count: int, kind: Any) -> Any:
    return pa.nulls(count, kind)
