"""Starting, ending and linking spans. See the package's docstring for the rules."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import SpanKind

from lepton.telemetry import settings
from lepton.telemetry.context import Carrier, context_of, links_of, resource_of
from lepton.telemetry.delivery import delivery_of
from lepton.telemetry.sampling import Ids, always, sampled
from lepton.telemetry.store import FileExporter


class Span:
    """A span under way; hand :attr:`carrier` to whatever runs below it."""

    def __init__(self, inner: trace.Span, parent: Carrier) -> None:
        self._inner = inner
        context = inner.get_span_context()
        flags = context.trace_flags & 1
        self.carrier = Carrier(
            f"00-{context.trace_id:032x}-{context.span_id:016x}-{flags:02x}",
            parent.directory,
            parent.baggage,
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

    A span that was not to be recorded is recorded after all if it fails.

    Args:
        name: a fixed name, with no ids in it.
        parent: where the block was asked from.
        kind: internal, server, client, producer or consumer.
        links: traceparents of related spans of other times.
        attributes: keys as they are.
    """
    began = time.time_ns()
    tracer = _tracer(os.getpid(), parent.directory)
    what: dict[str, Any] = {
        "kind": SpanKind[kind.upper()],
        "start_time": began,
        "links": links_of(links),
        "attributes": dict(attributes or {}),
    }
    inner = tracer.start_span(name, context=context_of(parent.traceparent), **what)
    try:
        yield Span(inner, parent)
    except BaseException as e:
        if not inner.is_recording():
            with _ids.giving(inner.get_span_context()):
                inner = tracer.start_span(name, context=_certain(parent), **what)
        _fail(inner, type(e).__qualname__)
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
    certain: bool | None = None,
) -> Carrier:
    """Record a span that is already over, with Unix times in nanoseconds; return its carrier.

    Args:
        name: a fixed name, with no ids in it.
        parent: where it was asked from.
        start_ns: when it began.
        end_ns: when it ended; default now.
        kind: internal, server, client, producer or consumer.
        error: the kind of error it ended with.
        links: traceparents of related spans of other times.
        attributes: keys as they are.
        certain: record it whether or not it is sampled; default for errors.
    """
    sure = bool(error) if certain is None else certain
    inner = _tracer(os.getpid(), parent.directory).start_span(
        name,
        context=_certain(parent) if sure else context_of(parent.traceparent),
        kind=SpanKind[kind.upper()],
        start_time=start_ns,
        links=links_of(links),
        attributes=dict(attributes or {}),
    )
    if error:
        _fail(inner, error)
    inner.end(end_ns if end_ns is not None else time.time_ns())
    return Span(inner, parent).carrier


_ids = Ids()


@lru_cache(maxsize=16)
def _tracer(pid: int, directory: str | None) -> trace.Tracer:
    """One provider per process and directory; ``pid`` makes a forked child get its own."""
    provider = sampled(
        TracerProvider(resource=resource_of(pid), shutdown_on_exit=False, id_generator=_ids)
    )
    if directory is not None:
        provider.add_span_processor(SimpleSpanProcessor(FileExporter(directory)))
    if settings.otlp("traces"):
        provider.add_span_processor(_Sent())
    return provider.get_tracer("lepton")


class _Sent(SpanProcessor):
    """Gives ended spans to this process's delivery."""

    def on_end(self, span: ReadableSpan) -> None:
        if span.context is not None and span.context.trace_flags.sampled:
            delivery_of("traces").put(span)


def _certain(parent: Carrier) -> Context:
    return always(context_of(parent.traceparent))


def _fail(inner: trace.Span, kind: str) -> None:
    inner.set_attribute("error.type", kind)
    inner.set_status(trace.StatusCode.ERROR, kind)


def _attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("_", ".", 1): value for key, value in attributes.items()}
