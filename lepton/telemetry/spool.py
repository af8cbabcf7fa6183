"""Ended spans in bulk, for request paths: one microsecond to add, one thread that writes.

A span of the SDK that is started, ended and written at once costs a request tens of microseconds.
Here a request leaves a tuple; a thread makes span records of them a few times a second, writes
them to the process's span file, and sends them by OTLP where that is asked for. What a SIGKILL
can lose is what :data:`EVERY_S` seconds brought.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from lepton.telemetry.spans import Carrier, context_in, otlp_exporter, resource_of
from lepton.telemetry.store import FileExporter

EVERY_S = 0.2
MOST = 20_000

log = logging.getLogger("lepton")
_SCOPE = InstrumentationScope("lepton")


@dataclass(frozen=True, slots=True)
class _Ended:
    name: str
    context: SpanContext
    parent: SpanContext | None
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
        self._directory = directory
        self._waiting: deque[_Ended] = deque()
        self._dropped = 0
        self._exporters: list[SpanExporter] | None = None
        self._resource = Resource.get_empty()
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._random = random.Random(os.urandom(16))  # noqa: S311 - ids, not secrets
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
    ) -> Carrier:
        """Take a span that ends now; return its carrier.

        A span whose parent was not sampled is not kept, unless it failed.

        Args:
            name: a fixed name, with no ids in it.
            parent: where it was asked from; one without a trace starts a new trace.
            start_ns: Unix nanoseconds.
            kind: internal, server, client, producer or consumer.
            error: the kind of error, or an empty string.
            links: traceparents of related spans of other times.
            attributes: keys as they are.
        """
        above = context_in(parent.traceparent)
        trace_id = above.trace_id if above else self._random.getrandbits(128)
        flags = above.trace_flags & 1 if above else 1
        span_id = self._random.getrandbits(64) or 1
        if flags or error:
            times = (start_ns, time.time_ns())
            own = SpanContext(trace_id, span_id, False, TraceFlags(flags))
            ended = _Ended(name, own, above, times, kind, error, links, attributes or {})
            if len(self._waiting) < MOST:
                self._waiting.append(ended)
            else:
                self._dropped += 1
        return Carrier(f"00-{trace_id:032x}-{span_id:016x}-{flags:02x}", parent.directory)

    def flush(self) -> None:
        """Write what waits; never from a request."""
        with self._writing:
            spans: list[ReadableSpan] = []
            exporters = self._out()
            while self._waiting:
                spans.append(self._span(self._waiting.popleft()))
            for exporter in exporters if spans else ():
                exporter.export(spans)
            if self._dropped:
                log.warning(
                    "%d request spans were dropped: more came than could be written", self._dropped
                )
                self._dropped = 0

    def close(self) -> None:
        """Write what waits and stop."""
        self._stop.set()
        self._thread.join()
        self.flush()

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            self.flush()

    def _out(self) -> list[SpanExporter]:
        if self._exporters is None:
            self._resource = resource_of(os.getpid())
            sent = otlp_exporter()
            self._exporters = [
                *([FileExporter(self._directory)] if self._directory is not None else []),
                *([sent] if sent else []),
            ]
        return self._exporters

    def _span(self, ended: _Ended) -> ReadableSpan:
        links = [found for found in map(context_in, ended.links) if found]
        attributes = dict(ended.attributes) | ({"error.type": ended.error} if ended.error else {})
        return ReadableSpan(
            name=ended.name,
            context=ended.context,
            parent=ended.parent,
            resource=self._resource,
            attributes=attributes,
            links=[Link(found) for found in links],
            kind=SpanKind[ended.kind.upper()],
            status=Status(StatusCode.ERROR, ended.error) if ended.error else Status(),
            start_time=ended.times[0],
            end_time=ended.times[1],
            instrumentation_scope=_SCOPE,
        )
