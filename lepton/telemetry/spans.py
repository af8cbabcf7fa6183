"""Starting, ending and linking spans. See the package's docstring for the rules."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.trace import SpanKind

from lepton.telemetry import settings
from lepton.telemetry.baggage import entries_of
from lepton.telemetry.context import (
    Carrier,
    carrier_of,
    context_of,
    encoder_of,
    links_of,
    process_of,
    resource_of,
)
from lepton.telemetry.delivery import delivery_of, say_what_is_not_offered
from lepton.telemetry.ledger import ledger_of
from lepton.telemetry.sampling import Ids, always, sampled
from lepton.telemetry.store import UNFINISHED, SpanFile
from lepton.telemetry.wire import Common, Ended

MOST_SAID = 500
"""Characters of an exception's message that are recorded."""

log = logging.getLogger("lepton")


class Span:
    """A span under way; hand :attr:`carrier` to whatever runs below it."""

    def __init__(self, inner: trace.Span, parent: Carrier) -> None:
        self._inner = inner
        context = inner.get_span_context()
        self.carrier = replace(parent, traceparent=_traceparent(context))

    def set(self, **attributes: Any) -> None:
        """Add attributes; underscores in names become dots (``lepton_table`` is lepton.table)."""
        for key, value in _attributes(attributes).items():
            self._inner.set_attribute(key, value)

    def link(self, traceparent: str) -> None:
        """Add a link to a related span of another time; what is no traceparent is left out."""
        for found in links_of([traceparent]):
            self._inner.add_link(found.context)


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

    A span that was not to be recorded is recorded after all if it fails. Its file has it from the
    beginning, so that a kill leaves no orphans below it. Not for requests: the exception's message
    is recorded, which may quote what was asked.

    Args:
        name: a fixed name, with no ids in it.
        parent: where the block was asked from; without a trace, what the environment says of that
            (``TRACEPARENT``, as a submitted job gets it), or a new trace.
        kind: internal, server, client, producer or consumer.
        links: traceparents of related spans of other times.
        attributes: keys as they are.
    """
    began = time.time_ns()
    parent = parent if parent.traceparent else _of_environment(parent)
    pid = os.getpid()
    tracer = _tracer(pid, parent.directory)
    what: dict[str, Any] = {
        "kind": SpanKind[kind.upper()],
        "start_time": began,
        "links": links_of(links),
        "attributes": dict(attributes or {}),
    }
    inner = tracer.start_span(name, context=context_of(parent.traceparent), **what)
    _kept(pid, parent.directory).begun(inner)
    try:
        yield Span(inner, parent)
    except BaseException as e:
        if not inner.is_recording():
            with _ids.giving(inner.get_span_context()):
                inner = tracer.start_span(name, context=_certain(parent), **what)
        _fail(inner, type(e).__qualname__)
        inner.set_attributes({"exception.type": _name_of(type(e)), "exception.message": _said(e)})
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


class Growing:
    """A span whose end and attributes grow; its file has the newest, should the process be killed.

    Args:
        name: a fixed name, with no ids in it.
        parent: where it was asked from.
        start_ns: Unix nanoseconds.
    """

    def __init__(self, name: str, parent: Carrier, start_ns: int) -> None:
        pid = os.getpid()
        self._kept = _kept(pid, parent.directory)
        self._inner: Any = _tracer(pid, parent.directory).start_span(
            name, context=context_of(parent.traceparent), start_time=start_ns
        )

    def write(self, end_ns: int, attributes: Mapping[str, Any]) -> None:
        """Write it as it stands."""
        if self._inner.is_recording():
            so_far = _ended(self._inner)
            common = replace(so_far.common, attributes=attributes)
            self._kept.write(so_far._replace(common=common, end_ns=end_ns))

    def end(self, end_ns: int, attributes: Mapping[str, Any]) -> None:
        """End it."""
        self._inner.set_attributes(attributes)
        self._inner.end(end_ns)


_ids = Ids()


@lru_cache(maxsize=16)
def _tracer(pid: int, directory: str | None) -> trace.Tracer:
    """One provider per process and directory; ``pid`` makes a forked child get its own."""
    say_what_is_not_offered()
    provider = sampled(
        TracerProvider(resource=resource_of(pid), shutdown_on_exit=False, id_generator=_ids)
    )
    provider.add_span_processor(_kept(pid, directory))
    return provider.get_tracer("lepton")


class _Kept(SpanProcessor):
    """Counts spans, writes ended ones to this process's file and gives them to its delivery."""

    def __init__(self, pid: int, directory: str | None) -> None:
        self._file = SpanFile(directory) if directory is not None else None
        self._ledger = (
            ledger_of(pid, directory, process_of(pid))
            if directory is not None and not settings.disabled()
            else None
        )

    def on_start(self, span: trace.Span, parent_context: Context | None = None) -> None:
        context = span.get_span_context()
        if self._ledger is not None and context.trace_flags.sampled:
            self._ledger.begin(f"{context.trace_id:032x}")

    def write(self, span: Ended) -> None:
        """Write a span as it stands; when it ends, it is written anew."""
        if self._file is not None:
            self._file.append([encoder_of(os.getpid()).encode(span, sent=False).line])

    def begun(self, span: Any) -> None:
        """Write a span that has begun, should its process be killed before it ends."""
        if self._file is None or not span.is_recording():
            return
        so_far = _ended(span)
        attributes = {**so_far.common.attributes, UNFINISHED: True}
        try:
            self.write(so_far._replace(common=replace(so_far.common, attributes=attributes)))
        except Exception:  # noqa: BLE001 - it is told when the span ends
            log.debug("telemetry: span %r cannot be encoded", span.name)

    def on_end(self, span: ReadableSpan) -> None:
        sent = settings.otlp("traces")
        if span.context is None or not span.context.trace_flags.sampled:
            return
        if self._file is None and not sent:
            return
        try:
            encoded = encoder_of(os.getpid()).encode(_ended(span))
        except Exception:  # such as half a character: a span is worth no one's failure
            log.exception("telemetry: span %r cannot be encoded and is lost", span.name)
            return
        if self._file is not None:
            self._file.append([encoded.line])
        if sent:
            delivery_of("traces").put(encoded.message)


@lru_cache(maxsize=16)
def _kept(pid: int, directory: str | None) -> _Kept:
    return _Kept(pid, directory)


def _ended(span: ReadableSpan) -> Ended:
    context, parent = span.get_span_context(), span.parent
    assert context is not None  # noqa: S101 - the SDK sets it
    failed = span.status.status_code is trace.StatusCode.ERROR
    return Ended(
        Common(
            span.name,
            span.kind.name.lower(),
            span.status.description or "error" if failed else "",
            [_traceparent(link.context) for link in span.links],
            dict(span.attributes or {}),
        ),
        f"{context.trace_id:032x}",
        f"{context.span_id:016x}",
        f"{parent.span_id:016x}" if parent else "",
        span.start_time or 0,
        max(span.start_time or 0, span.end_time or 0),  # a clock may be put back
    )


def _of_environment(parent: Carrier) -> Carrier:
    traceparent, baggage, tracestate = settings.asked_from()
    if not traceparent:
        return parent
    came = {"baggage": baggage, "tracestate": tracestate}
    found = carrier_of(traceparent, parent.directory, parent, **came)
    return found.with_baggage(entries_of(parent.baggage))


def _traceparent(context: trace.SpanContext) -> str:
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags & 1:02x}"


def _certain(parent: Carrier) -> Context:
    return always(context_of(parent.traceparent))


def _fail(inner: trace.Span, kind: str) -> None:
    inner.set_attribute("error.type", kind)
    inner.set_status(trace.StatusCode.ERROR, kind)


def _name_of(kind: type[BaseException]) -> str:
    """An exception's class with its module, as the semantic conventions have it."""
    module = kind.__module__
    return kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"


def _said(error: BaseException) -> str:
    """The first line of an exception's message."""
    try:
        return next(iter(str(error).splitlines()), "")[:MOST_SAID]
    except Exception:  # noqa: BLE001 - whatever its class does
        return ""


def _attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("_", ".", 1): value for key, value in attributes.items()}
