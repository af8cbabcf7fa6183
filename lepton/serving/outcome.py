"""What became of a request, and what is left of it: a span and a row of the inference log."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lepton.serving.answers import Answer, AnswerLog
from lepton.serving.arrays import Arrays
from lepton.serving.following import Resident
from lepton.serving.protocol import Inquiry
from lepton.telemetry import Carrier, Spool, carrier_of

SLOW_S = 1.0
"""From when on a request is slow: its span is recorded though its trace is not sampled."""
_TRACED = (b"traceparent", b"baggage")


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

    def span(self, headers: Iterable[tuple[bytes, bytes]], came: Outcome) -> Carrier:
        """Leave a request's span, under the one that its headers tell of; return its carrier."""
        came_with = {name: value for name, value in headers if name in _TRACED}
        trace, baggage = (came_with.get(k, b"").decode("latin-1") for k in _TRACED)
        parent = carrier_of(trace, self._directory, baggage=baggage)
        took = (time.time_ns() - came.began_ns) / 1e9
        return self._spans.add(
            "lepton.request",
            parent,
            came.began_ns,
            kind="server",
            error=came.kind,
            certain=came.status >= 500 or took > SLOW_S,
            links=[came.version.traceparent],
            attributes={
                **self._about(came),
                "lepton.checkpoint.trace": came.version.traceparent,
            },
        )

    def span_within(self, request: Carrier, came: Outcome) -> None:
        """Leave the span of what was asked besides, because of a request."""
        self._spans.add(
            "lepton.request",
            request,
            came.began_ns,
            error=came.kind,
            links=[came.version.traceparent],
            attributes=self._about(came),
        )

    def row(self, came: Outcome, identity: str, span: Carrier) -> None:
        """Leave a request's row (one for each of its own)."""
        self._answers.add(
            Answer(
                request_id=identity,
                time_us=came.began_ns // 1000,
                version=came.version.version,
                variant=came.variant,
                status=came.status,
                trace_id=span.trace_id,
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
