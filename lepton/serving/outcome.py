"""What became of a request, and what is left of it: a span and a row of the inference log."""

from __future__ import annotations

import re
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
from lepton.telemetry import Carrier, Common, Spool, entries_of, traceparent_in

SLOW_NS = 1_000_000_000
"""From when on a request is slow: its span is recorded though its trace is not sampled."""
BATCHES_NS = 1_000_000_000
"""Beside those of slow and failed requests, one batch in so long is told of."""
RPC = "/inference.GRPCInferenceService/"
"""How the path of a call by gRPC begins."""
RPC_CODES: Mapping[int, int] = {
    200: 0,
    400: 3,
    401: 16,
    403: 7,
    404: 5,
    413: 8,
    499: 1,
    500: 13,
    503: 14,
    504: 4,
}
"""gRPC's number for an HTTP status; others are internal errors, as 500."""
_RUN = Common("lepton.model.run")
_VERSION = re.compile("/versions/[^/]+/")
MOST_COMMON = 1000
"""Kinds of answers whose spans' common part is kept; then it begins anew."""


@dataclass
class Outcome:
    """What became of a request; ``call`` is its path, or the method that was called by gRPC."""

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
    call: str = ""

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
        self._next_ns = 0

    def span(self, headers: Mapping[bytes, bytes], came: Outcome) -> str:
        """Leave a request's span, under the one that its headers tell of; return its traceparent.

        What it shares with those of the same answer is made once.
        """
        parent = traceparent_in(headers.get(b"traceparent"))
        rows = len(came.inquiry.rows) if came.inquiry else 0
        key = (came.version.version, came.variant, came.status, came.kind, rows, came.call)
        common = self._commons.get(key) or self._common(key, came)
        ended_ns = time.time_ns()
        certain = came.status >= 500 or ended_ns - came.began_ns > SLOW_NS
        left = self._spans.leave(common, parent, came.began_ns, ended_ns, certain=certain)
        if came.batch is not None and came.batch.ended_ns:
            if certain:
                self._batch(left, came.batch)
            elif left[-1] == "1" and ended_ns >= self._next_ns:
                self._next_ns = ended_ns + BATCHES_NS
                self._batch(left, came.batch)
        return left

    def _batch(self, request: str, batch: Batch) -> None:
        """Leave the spans of a request's batch and of the model's run; before it was waiting."""
        about = {"lepton.requests": batch.requests, "lepton.rows": batch.rows}
        common = Common("lepton.batch", "internal", "", [], about)
        own = self._spans.leave(common, request, batch.began_ns, batch.ended_ns, certain=True)
        if batch.model_ns[1]:
            self._spans.leave(_RUN, own, *batch.model_ns, certain=True)

    def _common(self, key: tuple[object, ...], came: Outcome) -> Common:
        if len(self._commons) >= MOST_COMMON:
            self._commons.clear()
        found = request_span(self._about(came), came.version, came.call, came.status, came.kind)
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
            links=links_of(came.version),
            attributes={**self._about(came), **told_of_call("", came.status)},
            certain=came.status >= 500 or time.time_ns() - came.began_ns > SLOW_NS,
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
            "lepton.model": self._model,
            "lepton.version": came.version.version,
            "lepton.variant": came.variant,
            "lepton.rows": len(came.inquiry.rows) if came.inquiry else 0,
        }


def request_span(
    about: Mapping[str, Any], version: Resident, call: str, status: int, kind: str
) -> Common:
    """Return what a request's span says.

    By the semantic conventions the status of a server's span tells of the server's failures: what a
    client got wrong has ``error.type`` alone.

    Args:
        about: its attributes.
        version: which answered.
        call: its path, or the method that was called by gRPC.
        status: of HTTP.
        kind: of error, or an empty string.
    """
    told = {**about, **told_of_call(call, status), "lepton.checkpoint.trace": version.traceparent}
    if version.deployment:
        told["lepton.deployment.trace"] = version.deployment
    if kind and status < 500:
        told["error.type"], kind = kind, ""
    return Common("lepton.request", "server", kind, links_of(version), told)


def links_of(version: Resident) -> list[str]:
    """Return the spans of other times that an answer comes from: training and deployment."""
    return [t for t in (version.traceparent, version.deployment) if t]


def told_of_call(call: str, status: int) -> dict[str, Any]:
    """Return what the semantic conventions say of a request over HTTP, or of a call by gRPC."""
    if call.startswith(RPC):
        code = RPC_CODES.get(status, RPC_CODES[500])
        service, _, method = call[1:].partition("/")
        told = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
        return {**told, "rpc.grpc.status_code": code}
    told = {"http.request.method": "POST", "http.response.status_code": status}
    if not call:
        return told
    route = _VERSION.sub("/versions/{version}/", call)
    return {**told, "url.path": call, "url.scheme": "http", "http.route": route}


def call_of(scope: Mapping[str, Any]) -> str:
    """Return the path of a request, or the method that was called by gRPC."""
    return str(scope.get("rpc") or scope.get("path", ""))


def baggage_of(given: bytes | None, version: Resident) -> str:
    """Return the baggage of an answer: what came with the request, and the version's words."""
    if not given:
        return version.baggage
    came = Carrier(baggage=given.decode("latin-1"))
    return came.with_baggage(entries_of(version.baggage)).baggage
