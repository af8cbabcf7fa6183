"""Where a process stands in a trace, who it is, and how that goes from one to the next."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, TraceFlags

from lepton.telemetry.baggage import entries_of, header_of
from lepton.telemetry.wire import Encoder

_IDS = "-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})"
_TRACEPARENT = re.compile(f"00{_IDS}")
_LATER = re.compile(f"(?!00|ff)[0-9a-f]{{2}}{_IDS}(-.*)?")
"""Of a version to come, which begins like this one."""

_KINDS = bytes.maketrans(b"0123456789abcdefx", b"x" * 16 + b"?")
"""A digit of an id becomes an x, and an x something else."""
_USUAL = b"xx-" + 32 * b"x" + b"-" + 16 * b"x" + b"-xx"
_MAY_BE_NONE = b"-0000000000000000"


@dataclass(frozen=True, slots=True)
class Carrier:
    """What a process hands to the next one: the parent span and where spans are kept.

    Attributes:
        traceparent: W3C Trace Context header of the parent; empty starts a new trace.
        directory: folder of span files, or None for OTLP alone.
        baggage: W3C Baggage header: the run, model, version and table that all this is about.
        tracestate: what other tracers said beside the traceparent; it is handed on as it came.
    """

    traceparent: str = ""
    directory: str | None = None
    baggage: str = ""
    tracestate: str = ""

    @property
    def trace_id(self) -> str:
        """The trace id as 32 hex digits, or an empty string."""
        match = _TRACEPARENT.fullmatch(self.traceparent)
        return match[1] if match else ""

    @property
    def span_id(self) -> str:
        """The span's id as 16 hex digits, or an empty string."""
        match = _TRACEPARENT.fullmatch(self.traceparent)
        return match[2] if match else ""

    @property
    def headers(self) -> dict[str, str]:
        """What an outgoing request has to say of it."""
        told = {"traceparent": self.traceparent, "baggage": self.baggage}
        told |= {"tracestate": self.tracestate} if self.traceparent else {}
        return {name: value for name, value in told.items() if value}

    def with_baggage(self, entries: Mapping[str, object]) -> Carrier:
        """Return the same with more baggage; what has the same key is replaced."""
        return replace(self, baggage=header_of({**entries_of(self.baggage), **entries}))


def carrier_of(
    traceparent: str | None,
    directory: str | None,
    otherwise: Carrier | None = None,
    *,
    baggage: str | None = None,
    tracestate: str | None = None,
) -> Carrier:
    """Return a carrier for incoming headers.

    Args:
        traceparent: as it came.
        directory: where spans are kept.
        otherwise: what is returned when the traceparent is absent or malformed.
        baggage: as it came; it does not count without a traceparent.
        tracestate: the same.
    """
    found = _read(traceparent.strip()) if traceparent else ""
    if not found:
        return otherwise or Carrier("", directory)
    return Carrier(found, directory, baggage or "", tracestate or "")


def _read(header: str) -> str:
    """Return a header as this version has it; empty if it names no span."""
    if _TRACEPARENT.fullmatch(header):
        return header
    later = _LATER.fullmatch(header)
    return f"00-{later[1]}-{later[2]}-{int(later[3], 16) & 1:02x}" if later else ""


def traceparent_in(header: bytes | None) -> str:
    """Return a header if it is a traceparent, else an empty string."""
    if not header:
        return ""
    if header.translate(_KINDS) == _USUAL and header[:2] == b"00" and _MAY_BE_NONE not in header:
        return header.decode()  # this way costs less than a regex
    return carrier_of(header.decode("latin-1"), None).traceparent


def context_of(traceparent: str) -> Context:
    """Return OpenTelemetry's context with the span as the current one; an empty one without."""
    found = span_context_of(traceparent)
    return trace.set_span_in_context(NonRecordingSpan(found), Context()) if found else Context()


def links_of(traceparents: Sequence[str]) -> list[Link]:
    """Return links to the spans; what is no traceparent is left out."""
    found = (span_context_of(t) for t in traceparents)
    return [Link(c) for c in found if c is not None]


def span_context_of(traceparent: str) -> SpanContext | None:
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


@lru_cache(maxsize=4)
def resource_of(pid: int) -> Resource:
    """Return what all telemetry of a process says about it (``OTEL_RESOURCE_ATTRIBUTES`` too)."""
    resource = Resource.create(
        {
            "service.instance.id": f"{socket.gethostname()}-{pid}",
            "process.pid": pid,
            "lepton.process": _process_name(),
        }
    )
    named = str(resource.attributes.get("service.name", "unknown_service"))
    if named.startswith("unknown_service"):  # neither variable names it
        resource = resource.merge(Resource({"service.name": "lepton"}))
    return resource


@lru_cache(maxsize=4)
def encoder_of(pid: int) -> Encoder:
    """Return what encodes the spans of a process."""
    return Encoder(process_of(pid))


def process_of(pid: int) -> str:
    """Return what a process is called in files, and its id."""
    return f"{resource_of(pid).attributes['lepton.process']} ({pid})"


_named: dict[int, str] = {}


def name_process(name: str) -> None:
    """Give this process the name that its spans carry; call it before the first span."""
    _named[os.getpid()] = name


def _process_name() -> str:
    """What this process is to a reader of the trace: Ray's actor or task name, else the script."""
    title = sys.argv[0].rsplit("/", 1)[-1] if sys.argv else "python"
    if title != "default_worker.py":
        return title or "python"
    return _named.get(os.getpid(), "ray worker")
