"""A collector for tests: takes OTLP over HTTP on a free port and keeps what came."""

from __future__ import annotations

import gzip
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

_KINDS: dict[str, Any] = {
    "/v1/traces": ExportTraceServiceRequest,
    "/v1/metrics": ExportMetricsServiceRequest,
    "/v1/logs": ExportLogsServiceRequest,
}


class Collector:
    """Answers with ``status``; a request that it does not accept is not kept.

    Attributes:
        status: HTTP status of every answer.
        requests: how many came, kept or not.
        headers: of every answer.
        answer: body of every answer.
        asked: headers of the newest request.
        go: no request is answered while it is not set.
    """

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.headers: dict[str, str] = {}
        self.answer = b""
        self.asked: dict[str, str] = {}
        self.go = threading.Event()
        self.go.set()
        self.requests = 0
        self._kept: list[Any] = []
        self._came = threading.Condition()
        kept = self

        class Requests(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                kept.asked = dict(self.headers)
                status = kept._take(_KINDS[self.path].FromString(body))
                kept.go.wait(60)
                self.send_response(status)
                for name, value in kept.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(kept.answer)))
                self.end_headers()
                self.wfile.write(kept.answer)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Requests)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def _take(self, request: Any) -> int:
        with self._came:
            self.requests += 1
            if self.status == 200:
                self._kept.append(request)
            self._came.notify_all()
            return self.status

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of a process that sends everything here."""
        return {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": self.url, **more}

    def wait_for(self, condition: Any, timeout_s: float = 60) -> bool:
        """Wait until a condition on this collector holds."""
        with self._came:
            return self._came.wait_for(lambda: condition(self), timeout_s)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def spans(self) -> list[Any]:
        return [
            s
            for request in list(self._kept)
            for resource in getattr(request, "resource_spans", ())
            for scope in resource.scope_spans
            for s in scope.spans
        ]

    def logs(self) -> list[Any]:
        return [
            r
            for request in list(self._kept)
            for resource in getattr(request, "resource_logs", ())
            for scope in resource.scope_logs
            for r in scope.log_records
        ]

    def metrics(self) -> dict[str, Any]:
        """The newest of each metric, by name."""
        return {m.name: m for m in self.collections()}

    def metrics_by_process(self) -> dict[tuple[str, str], Any]:
        """The newest of each metric, by ``service.instance.id`` and name."""
        return {
            (attributes_of(resource.resource)["service.instance.id"], m.name): m
            for request in list(self._kept)
            for resource in getattr(request, "resource_metrics", ())
            for scope in resource.scope_metrics
            for m in scope.metrics
        }

    def collections(self) -> list[Any]:
        """Every metric as often as it came."""
        return [
            m
            for request in list(self._kept)
            for resource in getattr(request, "resource_metrics", ())
            for scope in resource.scope_metrics
            for m in scope.metrics
        ]


def attributes_of(thing: Any) -> dict[str, Any]:
    """The attributes of a span, a data point or a log record as plain values."""
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in thing.attributes}
