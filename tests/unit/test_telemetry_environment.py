"""OpenTelemetry's own variables, as a process of its own reads them; forks, and clocks put back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lepton import telemetry
from lepton.telemetry import Carrier, Common, Spool, settings, spans_of
from tests.unit.collector import Collector, attributes_of

SAMPLED, UNSAMPLED = (f"00-{'ab' * 16}-{'cd' * 8}-{flag}" for flag in ("01", "00"))

TOLD = """
import sys
from lepton import telemetry
telemetry.record("some", telemetry.Carrier("", sys.argv[1]), 1, 2)
telemetry.flush(60_000)
"""

FORKED = """
import os, sys
from lepton import telemetry
run = telemetry.Carrier("", sys.argv[1])
first = telemetry.record("parent", run, 1, 2)
telemetry.flush(60_000)
child = os.fork()
telemetry.record("child" if child == 0 else "parent", first, 1, 2)
sent = telemetry.flush(60_000)
if child == 0:
    os._exit(0 if sent else 1)
sys.exit(os.waitpid(child, 0)[1])
"""


def _run(script: str, folder: Path, collector: Collector, **more: str) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("OTEL_")}
    asked = {k: v.replace("URL", collector.url) for k, v in more.items()}
    command = [sys.executable, "-c", script, str(folder)]
    subprocess.run(command, env={**clean, **asked}, timeout=120, check=True)


def test_headers_resource_and_compression_are_obeyed(tmp_path: Path) -> None:
    collector = Collector()
    _run(
        TOLD,
        tmp_path,
        collector,
        OTEL_EXPORTER_OTLP_TRACES_ENDPOINT="URL/v1/traces",  # as it is, nothing added
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9",
        OTEL_METRICS_EXPORTER="none",
        OTEL_LOGS_EXPORTER="none",
        OTEL_EXPORTER_OTLP_HEADERS="api-key=a%20b%3D,x-other=%2C",
        OTEL_EXPORTER_OTLP_COMPRESSION="gzip",
        OTEL_RESOURCE_ATTRIBUTES="team=core,deployment.environment.name=a%20b",
        OTEL_SERVICE_NAME="mine",
    )
    collector.close()

    asked = {name.lower(): value for name, value in collector.asked.items()}
    assert (asked["api-key"], asked["x-other"]) == ("a b=", ",")
    assert asked["content-encoding"] == "gzip"
    (request,) = collector._kept
    about = attributes_of(request.resource_spans[0].resource)
    assert about["team"] == "core"
    assert about["service.name"] == "mine"
    assert about["deployment.environment.name"] == "a b"


def test_a_forked_process_has_files_and_a_delivery_of_its_own(tmp_path: Path) -> None:
    collector = Collector()
    _run(FORKED, tmp_path, collector, OTEL_EXPORTER_OTLP_ENDPOINT="URL")
    collector.close()

    found = spans_of(str(tmp_path))
    assert sorted(s.name for s in found) == ["child", "parent", "parent"]
    assert sorted(s.name for s in collector.spans()) == ["child", "parent", "parent"]
    assert len({s.process for s in found}) == len(list(tmp_path.glob("*.jsonl"))) == 2
    assert len({s.trace_id for s in found}) == 1


ASKED = """
import logging, sys
from lepton import telemetry
logging.basicConfig(format="%(message)s")
here = telemetry.Carrier("", sys.argv[1])
for _ in range(3):
    telemetry.record("some", here, 1, 2)
telemetry.measure("lepton.train.rows", 1)
telemetry.keep_logs(here, dict)()
print(telemetry.flush())
"""


def test_an_exporter_that_is_not_offered_is_said_once(tmp_path: Path) -> None:
    asked = {"TRACES": "console", "METRICS": "prometheus,statsd", "LOGS": "NONE"}
    named = {f"OTEL_{signal}_EXPORTER": names for signal, names in asked.items()}
    named["OTEL_PROPAGATORS"] = "tracecontext, baggage,b3"
    command = [sys.executable, "-c", ASKED, str(tmp_path)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("OTEL_")}
    runs = [
        subprocess.run(command, env=clean | more, capture_output=True, text=True, check=True)
        for more in (named, named | {"OTEL_SDK_DISABLED": "true"})
    ]

    said = runs[0].stderr.splitlines()
    assert [line.split(", which")[0] for line in said] == [
        "telemetry: OTEL_TRACES_EXPORTER names console",
        "telemetry: OTEL_METRICS_EXPORTER names statsd",
        "telemetry: OTEL_PROPAGATORS names b3",
    ]
    assert "There are otlp, none." in said[0]
    assert "There are otlp, prometheus, none." in said[1]
    assert len(spans_of(str(tmp_path))) == 3
    assert [(run.stdout, run.stderr) for run in runs[1:]] == [("True\n", "")]


@pytest.mark.parametrize("exporter", ["", "none", "console", "otlp", "console, OTLP"])
@pytest.mark.parametrize(
    ("chosen", "sent"),
    [({}, False), ({"ENDPOINT": "x"}, True), ({"TRACES_ENDPOINT": "x"}, True)],
)
def test_nothing_is_sent_unless_it_is_asked_for(
    chosen: dict[str, str], sent: bool, exporter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in chosen.items():
        monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{name}", value)
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", exporter)
    assert settings.otlp("traces") is ("otlp" in exporter.lower() if exporter else sent)
    monkeypatch.setenv("OTEL_SDK_DISABLED", "True")
    assert not settings.otlp("traces")


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, "http://localhost:4318/v1/traces"),
        ({"ENDPOINT": "http://c:1/base/"}, "http://c:1/base/v1/traces"),
        ({"ENDPOINT": "http://c:1", "TRACES_ENDPOINT": "http://t:2"}, "http://t:2"),
        ({"PROTOCOL": "grpc"}, "http://localhost:4317"),
        ({"PROTOCOL": "grpc", "ENDPOINT": "http://c:1"}, "http://c:1"),
    ],
)
def test_an_endpoint_is_made_of_the_base_or_is_its_own(
    variables: dict[str, str], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{name}", value)
    assert settings.endpoint("traces") == wanted


@pytest.mark.parametrize(
    ("sampler", "argument", "wanted"),
    [
        ("", "", [1, 0, 1]),
        ("parentbased_always_off", "", [1, 0, 0]),
        ("always_off", "", [0, 0, 0]),
        ("always_on", "", [1, 1, 1]),
        ("traceidratio", "0", [0, 0, 0]),
        ("parentbased_traceidratio", "nonsense", [1, 0, 1]),
    ],
)
def test_request_spans_are_sampled_as_the_environment_says(
    sampler: str, argument: str, wanted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", argument)
    spans = Spool(str(tmp_path))
    told = [spans.leave(Common("some"), above, 1, 2) for above in (SAMPLED, UNSAMPLED, "")]
    spans.leave(Common("error"), UNSAMPLED, 1, 2, certain=True)
    spans.close()

    assert [int(t[-2:]) for t in told] == wanted
    assert sorted(s.name for s in spans_of(str(tmp_path))) == ["error", *["some"] * sum(wanted)]


def test_a_queue_of_one_works(tmp_path: Path) -> None:
    collector = Collector()
    asked = {"OTEL_EXPORTER_OTLP_ENDPOINT": "URL", "OTEL_BSP_MAX_QUEUE_SIZE": "1"}
    _run(TOLD, tmp_path, collector, **asked)
    collector.close()
    assert [s.name for s in collector.spans()] == ["some"]


def test_a_clock_that_is_put_back_makes_no_span_end_before_it_began(tmp_path: Path) -> None:
    telemetry.record("by itself", Carrier("", str(tmp_path)), 2 * 10**18, 10**18)
    spans = Spool(str(tmp_path))
    for n in range(20):
        spans.leave(Common("many"), SAMPLED, 2 * 10**18, 10**18 + n)
    spans.leave(Common("one"), "", 2 * 10**18, 10**18)
    spans.close()
    found = spans_of(str(tmp_path))
    assert len(found) == 22
    assert {s.end_ns - s.start_ns for s in found} == {0}
