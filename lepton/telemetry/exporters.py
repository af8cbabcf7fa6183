"""OpenTelemetry's exporters, made as the environment wants them: OTLP by HTTP, or by gRPC.

Spans come here encoded (:mod:`lepton.telemetry.wire`); addresses, headers, certificates,
compression, time limits and retries are the exporters' own.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from importlib import import_module
from typing import Any, Protocol

from opentelemetry.sdk.trace.export import SpanExportResult

from lepton.errors import LeptonError
from lepton.telemetry import settings
from lepton.telemetry.connection import Connection, Reply
from lepton.telemetry.context import resource_of
from lepton.telemetry.settings import Signal
from lepton.telemetry.wire import request

THREAD = "lepton-telemetry-"
"""Threads that send have this name, and the signal behind it."""

reasons: dict[str, str] = {}
"""Why the last try to send a signal failed."""


@dataclass
class Answered:
    """What a collector said besides taking a request or not.

    Attributes:
        rejected: items that it did not take of a request that it took.
        why: its words for that.
        useless: it will never take this request.
        wait_s: it wants to be left alone so long.
        error: what went wrong.
    """

    rejected: int = 0
    why: str = ""
    useless: bool = False
    wait_s: float = 0.0
    error: str = ""


answered: dict[str, Answered] = {}
"""Of each signal's last request; of the thread that sends it."""
LONGEST_WAIT_S = 60.0


class Exporter(Protocol):
    """One of OpenTelemetry's."""

    def export(self, batch: Any, /) -> Any:
        """Send; return a result with a ``name``, SUCCESS or FAILURE."""
        ...


class Spans:
    """Sends encoded spans.

    Args:
        send: takes an encoded request; returns whether it was taken.
    """

    def __init__(self, send: Callable[[bytes], bool]) -> None:
        self._send = send

    def export(self, batch: Sequence[bytes]) -> SpanExportResult:
        """Send."""
        resource: Mapping[str, Any] = resource_of(os.getpid()).attributes
        sent = self._send(request(resource, batch))
        return SpanExportResult.SUCCESS if sent else SpanExportResult.FAILURE


def spans() -> Exporter:
    """Return an exporter of encoded spans."""
    exporter = _made("traces", "trace_exporter", "OTLPSpanExporter")
    if settings.protocol("traces") == "grpc":
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

        exporter._translate_data = trace_service_pb2.ExportTraceServiceRequest.FromString
        exporter._count_data = len
        return Spans(lambda data: exporter.export(data) is SpanExportResult.SUCCESS)
    return Spans(lambda data: exporter._client.export(data).success)


def metrics() -> Any:
    """Return an exporter of metrics."""
    return _made("metrics", "metric_exporter", "OTLPMetricExporter")


def logs() -> Exporter:
    """Return an exporter of log records."""
    return _made("logs", "_log_exporter", "OTLPLogExporter")


def _made(signal: Signal, module: str, name: str) -> Any:
    protocol = settings.protocol(signal)
    if protocol not in _PACKAGES:
        raise LeptonError(
            f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}, which {signal} cannot be sent by. "
            f"Set it to one of {', '.join(_PACKAGES)}"
        )
    package = _PACKAGES[protocol]
    try:
        found = import_module(f"{package}.{module}")
    except ModuleNotFoundError as e:
        raise LeptonError(
            f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}, which needs a package that is not "
            "installed: pip install 'lepton[export]', or set it to http/protobuf"
        ) from e
    for complains in (found.__name__, f"{package}.exporter"):
        logging.getLogger(complains).addFilter(_quiet)
    if protocol == "grpc":
        return getattr(found, name)()
    light = Connection() if _plain(signal) else None
    exporter = getattr(found, name)(**({"_transport": light} if light else {}))
    client = exporter._client
    client._transport = Heard(client._transport, signal, client._timeout)
    return exporter


def _plain(signal: Signal) -> bool:
    """Whether neither TLS nor a proxy stands before the collector."""
    proxies = {"http_proxy", "all_proxy"} & {name.lower() for name in os.environ}
    return not proxies and settings.endpoint(signal).startswith("http://")


class Heard:
    """A transport whose answers are heard to the end: what OpenTelemetry's client leaves out.

    A redirect, which that client takes for success, is none; what a collector rejects of a request
    that it takes is counted; and how long it wants to be left alone is kept.

    Args:
        inner: an exporter's transport.
        signal: what it sends.
        longest_s: for one request; what is left of it by a clock that is put back may be more.
    """

    def __init__(self, inner: Any, signal: Signal, longest_s: float = LONGEST_WAIT_S) -> None:
        self._inner = inner
        self._signal = signal
        self._longest_s = longest_s
        self.is_connection_error: Callable[[Exception | None], bool] = inner.is_connection_error
        self.close: Callable[[], None] = inner.close

    def request(self, method: str, url: str, *, timeout: float, **given: Any) -> Any:
        """Ask, and hear the answer."""
        heard = answered[self._signal] = Answered()
        reply = self._inner.request(method, url, timeout=min(timeout, self._longest_s), **given)
        status = reply.status_code or 0
        if reply.error is not None:
            heard.error = str(reply.error)
        elif status >= HTTPStatus.BAD_REQUEST:
            heard.error = f"status {status} {reply.reason or ''}".rstrip()
        if status // 100 == _REDIRECTED:
            where = reply.headers().get("location", "elsewhere")
            return Reply(error=ValueError(f"status {status}: it is at {where}; name that endpoint"))
        if status == HTTPStatus.OK:
            with suppress(Exception):  # an answer that is none of OTLP's says nothing
                _hear_what_was_rejected(heard, reply.content())
        heard.useless = status in _USELESS
        with suppress(ValueError):
            wait_s = float(reply.headers().get("retry-after") or 0)
            heard.wait_s = min(max(0.0, wait_s), LONGEST_WAIT_S)
        return reply


def _hear_what_was_rejected(heard: Answered, body: bytes) -> None:
    """Read a partial success; those of the three signals have the same fields."""
    if body:
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

        read = trace_service_pb2.ExportTraceServiceResponse.FromString(body)
        heard.rejected = read.partial_success.rejected_spans
        heard.why = read.partial_success.error_message


_REDIRECTED = 3
_USELESS = {HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE}

_PACKAGES = {
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http",
    "grpc": "opentelemetry.exporter.otlp.proto.grpc",
}


class _Quiet(logging.Filter):
    """Keeps the exporters' complaints about every single try as the reason to be said once."""

    def filter(self, record: logging.LogRecord) -> bool:
        name = record.threadName or ""
        if not name.startswith(THREAD):
            return True
        reasons[name.removeprefix(THREAD)] = record.getMessage()
        return False


_quiet = _Quiet()
