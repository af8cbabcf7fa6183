"""OTLP by gRPC: all three signals to a real server, and what is said without the package."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2, logs_service_pb2_grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

PACKAGE = "opentelemetry.exporter.otlp.proto.grpc"

ALL_THREE = """
import logging
from lepton import telemetry
logging.basicConfig()
with telemetry.span("one", telemetry.Carrier(), attributes={"n": 1}) as span:
    telemetry.keep_logs(span.carrier, dict)
    telemetry.measure("lepton.train.rows", 3)
    telemetry.measure("lepton.train.step.duration", 0.5)
    logging.getLogger("lepton").warning("said")
assert telemetry.flush(30_000) or %r
"""


class Receiver:
    """Takes every signal."""

    def __init__(self) -> None:
        self.taken: list[Any] = []
        answers = {
            "trace": trace_service_pb2.ExportTraceServiceResponse,
            "metrics": metrics_service_pb2.ExportMetricsServiceResponse,
            "logs": logs_service_pb2.ExportLogsServiceResponse,
        }
        services = {
            "trace": trace_service_pb2_grpc.add_TraceServiceServicer_to_server,
            "metrics": metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server,
            "logs": logs_service_pb2_grpc.add_LogsServiceServicer_to_server,
        }
        self.server = grpc.server(ThreadPoolExecutor(2))
        for name, add in services.items():
            add(_Service(self.taken, answers[name]), self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()


class _Service:
    def __init__(self, taken: list[Any], answer: Any) -> None:
        self._taken, self._answer = taken, answer

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - the protocol's name
        self._taken.append(request)
        return self._answer()


def _run(port: int, *, well: bool) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", ALL_THREE % (not well)],
        env={
            **os.environ,
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


@pytest.mark.skipif(find_spec(PACKAGE) is None, reason="needs pip install 'lepton[export]'")
def test_all_signals_arrive() -> None:
    receiver = Receiver()
    try:
        _run(receiver.port, well=True)
    finally:
        receiver.server.stop(0).wait(30)

    spans = [
        span.name
        for request in receiver.taken
        for resource in getattr(request, "resource_spans", ())
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    metrics = {
        metric.name
        for request in receiver.taken
        for resource in getattr(request, "resource_metrics", ())
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
    assert spans == ["one"]
    assert metrics == {"lepton.train.rows", "lepton.train.step.duration"}
    assert any("said" in str(request) for request in receiver.taken)


@pytest.mark.skipif(find_spec(PACKAGE) is not None, reason="the package is installed")
def test_a_missing_package_is_said_once_a_signal_and_ends_nothing() -> None:
    said = _run(1, well=False).stderr

    assert "pip install 'lepton[export]'" in said
    assert said.count("this is said once") == 2  # spans and logs
    assert said.count("metrics are not sent") == 1
    assert "Traceback" not in said
