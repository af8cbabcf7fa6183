"""What became of a request, and what is left of it: a span and a row of the inference log."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lepton.serving.answers import Answer, AnswerLog
from lepton.serving.arrays import Arrays
from lepton.serving.batching import Batch
from lepton.serving.following import Resident
from lepton.serving.protocol import Inquiry
from lepton.telemetry import Carrier, Common, Spool, traceparent_in

SLOW_NS = 1_000_000_000
"""From when on a request is slow: its span is recorded though its trace is not sampled."""
MOST_COMMON = 1000
"""Kinds of answers whose spans' common part is kept; then it begins anew."""


@dataclass
class Outcome:
    """What became of a request."""

    version: Resident
    variant: str
    began_ns: int
    status: int = 200
    error: str = ""
    kind: str = ""
    failure: Exception | None = None
    retry_after_s: int | None = None
    inquiry: Inquiry | Arrays | None = None
    outputs: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict[str, Any])
    batch: Batch | None = None

    def fail(self, status: int, error: Exception | str, kind: str = "") -> None:
        """Note what went wrong."""
        self.status, self.error = status, str(error)
        self.kind = kind or type(error).__name__


class Keeper:
    """Keeps what is left of a model's requests; nothing here waits for the lake or a collector.

    Args:
        model: which was asked.
        directory: of span files.
        spans: take the spans.
        answers: take the rows.
    """

    def __init__(self, model: str, directory: str | None, spans: Spool, answers: AnswerLog) -> None:
        self._model = model
        self._directory = directory
        self._spans = spans
        self._answers = answers
        self._commons: dict[tuple[object, ...], Common] = {}

    def span(self, headers: Mapping[bytes, bytes], came: Outcome) -> str:
        """Leave a request's span, under the one that its headers tell of; return its traceparent.

        What it shares with those of the same answer is made once.
        """
        parent = traceparent_in(headers.get(b"traceparent"))
        rows = len(came.inquiry.rows) if came.inquiry else 0
        key = (came.version.version, came.variant, came.status, came.kind, rows)
        common = self._commons.get(key) or self._common(key, came)
        ended_ns = time.time_ns()
        certain = came.status >= 500 or ended_ns - came.began_ns > SLOW_NS
        left = self._spans.leave(common, parent, came.began_ns, ended_ns, certain=certain)
        if certain and came.batch is not None and came.batch.ended_ns:
            self._batch(left, came.batch)
        return left

    def _batch(self, request: str, batch: Batch) -> None:
        """Leave the span of a slow or failed request's batch: what is before it was waiting."""
        about = {"lepton.requests": batch.requests, "lepton.rows": batch.rows}
        common = Common("lepton.batch", "internal", "", [], about)
        self._spans.leave(common, request, batch.began_ns, batch.ended_ns, certain=True)

    def _common(self, key: tuple[object, ...], came: Outcome) -> Common:
        if len(self._commons) >= MOST_COMMON:
            self._commons.clear()
        trace = came.version.traceparent
        about = {**self._about(came), "lepton.checkpoint.trace": trace}
        found = Common("lepton.request", "server", came.kind, [trace], about)
        self._commons[key] = found
        return found

    def carrier(self, traceparent: str) -> Carrier:
        """Return what goes on from a request's span."""
        return Carrier(traceparent, self._directory)

    def span_within(self, request: str, came: Outcome) -> None:
        """Leave the span of what was asked besides, because of a request."""
        self._spans.add(
            "lepton.request",
            self.carrier(request),
            came.began_ns,
            error=came.kind,
            links=[came.version.traceparent],
            attributes=self._about(came),
        )

    def row(self, came: Outcome, identity: str, traceparent: str) -> None:
        """Leave a request's row (one for each of its own)."""
        self._answers.add(
            Answer(
                request_id=identity,
                time_us=came.began_ns // 1000,
                version=came.version.version,
                variant=came.variant,
                status=came.status,
                trace_id=traceparent[3:35],
                latency_ms=(time.time_ns() - came.began_ns) / 1e6,
                rows=came.inquiry.rows if came.inquiry and came.status == 200 else None,
                outputs=came.outputs,
                given_bytes=came.inquiry.size if came.inquiry else 0,
            )
        )

    def _about(self, came: Outcome) -> dict[str, Any]:
        return {
            "http.request.method": "POST",
            "http.response.status_code": came.status,
            "lepton.model": self._model,
            "lepton.version": came.version.version,
            "lepton.variant": came.variant,
            "lepton.rows": len(came.inquiry.rows) if came.inquiry else 0,
        }
