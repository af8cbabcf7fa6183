"""Starting, ending and linking spans. See the package's docstring for the rules."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.trace import SpanKind

from lepton.telemetry import settings
from lepton.telemetry.context import Carrier, context_of, links_of, resource_of
from lepton.telemetry.metrics import flush_metrics
from lepton.telemetry.rounds import rounds
from lepton.telemetry.store import FileExporter


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
        context=context_of(parent.traceparent),
        kind=SpanKind[kind.upper()],
        links=links_of(links),
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
        context=context_of(parent.traceparent),
        kind=SpanKind[kind.upper()],
        start_time=start_ns,
        links=links_of(links),
        attributes=dict(attributes or {}),
    )
    if error:
        inner.set_attribute("error.type", error)
        inner.set_status(trace.StatusCode.ERROR, error)
    inner.end(end_ns if end_ns is not None else time.time_ns())
    return Span(inner, parent.directory).carrier


def flush(timeout_ms: int = 2000) -> None:
    """Send what is waiting for OTLP; call it where a process ends, never in the hot path."""
    rounds.make(last=True)
    for provider in _PROVIDERS:
        provider.force_flush(timeout_ms)
    flush_metrics(timeout_ms)


_PROVIDERS: list[TracerProvider] = []


@lru_cache(maxsize=16)
def _tracer(pid: int, directory: str | None) -> trace.Tracer:
    """One provider per process and directory; ``pid`` makes a forked child get its own."""
    provider = TracerProvider(resource=resource_of(pid), shutdown_on_exit=False)
    if directory is not None:
        provider.add_span_processor(SimpleSpanProcessor(FileExporter(directory)))
    if settings.otlp("traces"):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        provider.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(), schedule_delay_millis=200)
        )
    _PROVIDERS.append(provider)
    return provider.get_tracer("lepton")


def _attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("_", ".", 1): value for key, value in attributes.items()}
