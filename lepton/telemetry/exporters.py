"""OpenTelemetry's exporters, made as the environment wants them: OTLP by HTTP, or by gRPC.

Spans come here encoded (:mod:`lepton.telemetry.wire`); addresses, headers, certificates,
compression, time limits and retries are the exporters' own.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

from opentelemetry.sdk.trace.export import SpanExportResult

from lepton.errors import LeptonError
from lepton.telemetry import settings
from lepton.telemetry.context import resource_of
from lepton.telemetry.settings import Signal
from lepton.telemetry.wire import request

THREAD = "lepton-telemetry-"
"""Threads that send have this name, and the signal behind it."""

reasons: dict[str, str] = {}
"""Why the last try to send a signal failed."""


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
    light = _light(signal) if protocol != "grpc" else None
    return getattr(found, name)(_transport=light) if light else getattr(found, name)()


def _light(signal: Signal) -> Any:
    """Return what posts for a third of the usual cost, unless TLS or a proxy is asked for."""
    proxies = {"http_proxy", "all_proxy"} & {name.lower() for name in os.environ}
    if proxies or not settings.endpoint(signal).startswith("http://"):
        return None
    try:
        transport = import_module("opentelemetry.exporter.http.transport._urllib3")
    except ModuleNotFoundError:
        return None
    return transport.Urllib3HTTPTransport()


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
