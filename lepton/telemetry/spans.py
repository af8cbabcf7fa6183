"""Starting, ending and linking spans. See the package's docstring for the rules."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, SpanKind, TraceFlags

from lepton.telemetry.store import FileExporter

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


@dataclass(frozen=True, slots=True)
class Carrier:
    """What a process hands to the next one: the parent span and where spans are kept.

    Attributes:
        traceparent: W3C Trace Context header of the parent; empty starts a new trace.
        directory: folder of span files, or None for OTLP alone.
    """

    traceparent: str = ""
    directory: str | None = None

    @property
    def trace_id(self) -> str:
        """The trace id as 32 hex digits, or an empty string."""
        match = _TRACEPARENT.fullmatch(self.traceparent)
        return match[1] if match else ""


class Span:
    """A span under way; hand :attr:`carrier` to whatever runs below it."""

    def __init__(self, inner: trace.Span, directory: str | None) -> None:
        self._inner = inner
        context = inner.get_span_context()
        flags = context.trace_flags & 1
        self.carrier = Carrier(
            f"00-{context.trace_id:032x}-{context.span_id:016x}-{flags:02x}", directory
        )

    def set(self, **attributes: Any) -> None:
        """Add attributes; underscores in names become dots (``lepton_table`` is lepton.table)."""
        for key, value in _attributes(attributes).items():
            self._inner.set_attribute(key, value)


def carrier_of(
    traceparent: str | None, directory: str | None, otherwise: Carrier | None = None
) -> Carrier:
    """Return a carrier for an incoming header, or ``otherwise`` when it is absent or malformed."""
    if traceparent and _TRACEPARENT.fullmatch(traceparent.strip()):
        return Carrier(traceparent.strip(), directory)
    return otherwise or Carrier("", directory)


@contextmanager
def span(
    name: str,
    parent: Carrier,
    *,
    kind: str = "internal",
    links: Sequence[str] = (),
    attributes: Mapping[str, Any] | None = None,
) -> Generator[Span]:
    """Run a block under a span; an exception marks it as failed and goes on.

    Args:
        name: a fixed name, with no ids in it.
        parent: where the block was asked from.
        kind: internal, server, client, producer or consumer.
        links: traceparents of related spans of other times.
        attributes: keys as they are.
    """
    inner = _tracer(os.getpid(), parent.directory).start_span(
        name,
        context=_context(parent),
        kind=SpanKind[kind.upper()],
        links=_links(links),
        attributes=dict(attributes or {}),
    )
    running = Span(inner, parent.directory)
    try:
        yield running
    except BaseException as e:
        inner.set_attribute("error.type", type(e).__qualname__)
        inner.set_status(trace.StatusCode.ERROR, type(e).__qualname__)
        raise
    finally:
        inner.end()


def record(
    name: str,
    parent: Carrier,
    start_ns: int,
    end_ns: int | None = None,
    *,
    kind: str = "internal",
    error: str | None = None,
    links: Sequence[str] = (),
    attributes: Mapping[str, Any] | None = None,
) -> Carrier:
    """Record a span that is already over, with Unix times in nanoseconds; return its carrier."""
    inner = _tracer(os.getpid(), parent.directory).start_span(
        name,
        context=_context(parent),
        kind=SpanKind[kind.upper()],
        start_time=start_ns,
        links=_links(links),
        attributes=dict(attributes or {}),
    )
    if error:
        inner.set_attribute("error.type", error)
        inner.set_status(trace.StatusCode.ERROR, error)
    inner.end(end_ns if end_ns is not None else time.time_ns())
    return Span(inner, parent.directory).carrier


def flush(timeout_ms: int = 2000) -> None:
    """Send what is waiting for OTLP; call it where a process ends, never in the hot path."""
    for provider in _PROVIDERS:
        provider.force_flush(timeout_ms)


_PROVIDERS: list[TracerProvider] = []
_named: dict[int, str] = {}


@lru_cache(maxsize=16)
def _tracer(pid: int, directory: str | None) -> trace.Tracer:
    """One provider per process and directory; ``pid`` makes a forked child get its own."""
    provider = TracerProvider(resource=resource_of(pid), shutdown_on_exit=False)
    if directory is not None:
        provider.add_span_processor(SimpleSpanProcessor(FileExporter(directory)))
    sent = otlp_exporter()
    if sent is not None:
        provider.add_span_processor(BatchSpanProcessor(sent, schedule_delay_millis=200))
    _PROVIDERS.append(provider)
    return provider.get_tracer("lepton")


def resource_of(pid: int) -> Resource:
    """Return what all spans of a process say about it."""
    return Resource.create(
        {"service.name": "lepton", "process.pid": pid, "lepton.process": _process_name()}
    )


def otlp_exporter() -> SpanExporter | None:
    """Return what sends spans by OTLP, or None where the environment names no endpoint."""
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


def _process_name() -> str:
    """What this process is to a reader of the trace: Ray's actor or task name, else the script."""
    title = sys.argv[0].rsplit("/", 1)[-1] if sys.argv else "python"
    if title != "default_worker.py":
        return title or "python"
    return _named.get(os.getpid(), "ray worker")


def name_process(name: str) -> None:
    """Give this process the name that its spans carry; call it before the first span."""
    _named[os.getpid()] = name


def _context(parent: Carrier) -> Any:
    found = context_in(parent.traceparent)
    return trace.set_span_in_context(NonRecordingSpan(found), Context()) if found else Context()


def context_in(traceparent: str) -> SpanContext | None:
    """Return the span that a header names, or None if it names none."""
    match = _TRACEPARENT.fullmatch(traceparent)
    if not match:
        return None
    return SpanContext(
        trace_id=int(match[1], 16),
        span_id=int(match[2], 16),
        is_remote=True,
        trace_flags=TraceFlags(int(match[3], 16) & 1),
    )


def _links(traceparents: Sequence[str]) -> list[Link]:
    found = (context_in(t) for t in traceparents)
    return [Link(c) for c in found if c is not None]


def _attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("_", ".", 1): value for key, value in attributes.items()}
