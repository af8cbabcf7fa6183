"""Ended spans in bulk, for request paths: microseconds to add, one thread that writes.

A span of the SDK that is started, ended and written at once costs a request tens of microseconds.
Here a request leaves a tuple; a thread makes span records of them a few times a second, writes
them to the process's span file, and hands them to the delivery where OTLP is asked for. What a
SIGKILL can lose is what :data:`EVERY_S` seconds brought.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from lepton.telemetry import settings
from lepton.telemetry.context import Carrier, links_of, resource_of
from lepton.telemetry.delivery import before_flush, delivery_of, prepare
from lepton.telemetry.store import FileExporter, process_of

EVERY_S = 0.2
MOST = 20_000

log = logging.getLogger("lepton")
_SCOPE = InstrumentationScope("lepton")


class _Ended(NamedTuple):
    """A span that is over; ids are hex, the parent's empty where a trace begins."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    times: tuple[int, int]
    kind: str
    error: str
    links: Sequence[str]
    attributes: Mapping[str, Any]


class Spool:
    """Takes ended spans from any thread.

    Args:
        directory: folder of span files, or None for OTLP alone.
    """

    def __init__(self, directory: str | None) -> None:
        prepare()
        self._waiting: deque[_Ended] = deque()
        self._dropped = 0
        self._file = FileExporter(directory) if directory is not None else None
        self._sampler = (
            TracerProvider(shutdown_on_exit=False).sampler
            if os.environ.get("OTEL_TRACES_SAMPLER")
            else None
        )
        self._wanted = not settings.disabled()
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._random = random.Random(os.urandom(16))  # noqa: S311 - ids, not secrets
        self._leave = before_flush(self.flush)
        self._thread = threading.Thread(target=self._run, daemon=True, name="lepton-spans")
        self._thread.start()

    def add(
        self,
        name: str,
        parent: Carrier,
        start_ns: int,
        *,
        kind: str = "internal",
        error: str = "",
        links: Sequence[str] = (),
        attributes: Mapping[str, Any] | None = None,
        certain: bool = False,
    ) -> Carrier:
        """Take a span that ends now; return its carrier.

        Args:
            name: a fixed name, with no ids in it.
            parent: where it was asked from, as :func:`carrier_of` gives it; one without a trace
                starts a new one.
            start_ns: Unix nanoseconds.
            kind: internal, server, client, producer or consumer.
            error: the kind of error, or an empty string.
            links: traceparents of related spans of other times, well formed or empty.
            attributes: keys as they are.
            certain: keep it whether or not it is sampled.
        """
        above = parent.traceparent
        if above:
            trace_id, parent_id, flags = above[3:35], above[36:52], int(above[53:], 16) & 1
        else:
            number = self._random.getrandbits(128)
            trace_id, parent_id, flags = f"{number:032x}", "", self._root(number, name)
        span_id = f"{self._random.getrandbits(64) or 1:016x}"
        if (flags or certain) and self._wanted:
            times = (start_ns, time.time_ns())
            ids = (trace_id, span_id, parent_id)
            ended = _Ended(name, *ids, times, kind, error, links, attributes or {})
            if len(self._waiting) < MOST:
                self._waiting.append(ended)
            else:
                self._dropped += 1
        traceparent = f"00-{trace_id}-{span_id}-{flags:02x}"
        return Carrier(traceparent, parent.directory, parent.baggage)

    def flush(self) -> None:
        """Write what waits; never from a request."""
        with self._writing:
            spans = [self._waiting.popleft() for _ in range(len(self._waiting))]
            if spans and self._file is not None:
                process = process_of(resource_of(os.getpid()))
                self._file.append([_fields(span, process) for span in spans])
            if settings.otlp("traces"):
                for span in spans:
                    delivery_of("traces").put(_span(span))
            if self._dropped:
                log.warning("%d request spans dropped: more than could be written", self._dropped)
                self._dropped = 0

    def close(self) -> None:
        """Write what waits and stop."""
        self._leave()
        self._stop.set()
        self._thread.join()
        self.flush()

    def _root(self, trace_id: int, name: str) -> int:
        """Whether a trace that begins here is sampled, as a flag."""
        if self._sampler is None:
            return 1
        return int(self._sampler.should_sample(None, trace_id, name).decision.is_sampled())

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            self.flush()


def _attributes(ended: _Ended) -> Mapping[str, Any]:
    return {**ended.attributes, "error.type": ended.error} if ended.error else ended.attributes


def _fields(ended: _Ended, process: str) -> dict[str, Any]:
    """The fields of a :class:`~lepton.telemetry.store.SpanRecord`, without a detour by the SDK."""
    return {
        "name": ended.name,
        "trace_id": ended.trace_id,
        "span_id": ended.span_id,
        "parent_id": ended.parent_id or None,
        "start_ns": ended.times[0],
        "end_ns": ended.times[1],
        "process": process,
        "status": "error" if ended.error else "ok",
        "attributes": _attributes(ended),
        "links": [f"{k[3:35]}:{k[36:52]}" for k in ended.links if k],
    }


def _context(trace_id: str, span_id: str, *, remote: bool) -> SpanContext:
    return SpanContext(int(trace_id, 16), int(span_id, 16), remote, TraceFlags(1))


def _span(ended: _Ended) -> ReadableSpan:
    return ReadableSpan(
        name=ended.name,
        context=_context(ended.trace_id, ended.span_id, remote=False),
        parent=_context(ended.trace_id, ended.parent_id, remote=True) if ended.parent_id else None,
        resource=resource_of(os.getpid()),
        attributes=_attributes(ended),
        links=links_of(ended.links),
        kind=SpanKind[ended.kind.upper()],
        status=Status(StatusCode.ERROR, ended.error) if ended.error else Status(),
        start_time=ended.times[0],
        end_time=ended.times[1],
        instrumentation_scope=_SCOPE,
    )
