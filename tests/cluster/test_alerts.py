"""A real Prometheus with our rules scrapes Ray's endpoint: it finds what every process measures.

A replica is killed, a collector refuses, a driver sees drift: the alerts fire.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from lepton import cluster
from tests.unit.collector import Collector

CLUSTERS = Path(__file__).parents[2] / "clusters"
LONG_S = 180
ROWS = 60
"""Of alerts_driver's table, which Ray Data's tasks read once."""


@contextmanager
def _running(command: list[str], **given: Any) -> Generator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, text=True, start_new_session=True, **given)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def _configure(folder: Path, target: str) -> Path:
    """The rules as they are, but quicker; and a second between scrapes."""
    rules = (CLUSTERS / "alerts.yaml").read_text()
    assert rules.count("> 30)") == rules.count("for: 10s") == 1
    rules = rules.replace("> 30)", "> 5)").replace("for: 10s", "for: 1s")
    (folder / "alerts.yaml").write_text(rules)
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["alerts.yaml"],
        "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": [target]}]}],
    }
    path = folder / "prometheus.yaml"
    path.write_text(json.dumps(config))
    return path


class Asked:
    """Prometheus' own API."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1"

    def query(self, expression: str) -> list[Any]:
        with suppress(httpx.TransportError):
            reply = httpx.get(f"{self._url}/query", params={"query": expression}, timeout=10)
            if reply.status_code == 200:
                return reply.json()["data"]["result"]
        return []

    def firing(self) -> dict[str, dict[str, str]]:
        alerts = httpx.get(f"{self._url}/alerts", timeout=10).json()["data"]["alerts"]
        return {a["labels"]["alertname"]: a["labels"] for a in alerts if a["state"] == "firing"}


def _wait(for_: Any) -> Any:
    end = time.monotonic() + LONG_S
    while not (found := for_()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


def test_the_alert_fires_when_a_replica_is_killed(tmp_path: Path) -> None:
    if shutil.which("prometheus") is None:
        pytest.skip("no prometheus: `make test` installs it (apt-get install prometheus)")
    refusing = Collector(status=400)
    environment = {
        **os.environ,
        "OTEL_METRICS_EXPORTER": "prometheus",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{refusing.url}/v1/traces",
    }
    environment.pop("RAY_ADDRESS", None)
    (port,) = cluster.free_ports(1)
    driver = [
        sys.executable,
        str(Path(__file__).with_name("alerts_driver.py")),
        str(tmp_path / "h"),
    ]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with _running(driver, env=environment, **pipes) as served:
        assert served.stdout is not None
        told = json.loads(served.stdout.readline())
        config = _configure(tmp_path, told["target"])
        options = [
            f"--config.file={config}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with _running(["prometheus", *options], **quiet):
            asked = Asked(port)
            alive = 'ray_lepton_serving_alive{lepton_model="m"} > 0'
            _wait(lambda: asked.query(alive))
            assert _wait(lambda: asked.query("ray_http_server_request_duration_count"))
            tasks = 'ray_lepton_read_rows_total{Component="core_worker"}'
            assert sum(float(r["value"][1]) for r in _wait(lambda: asked.query(tasks))) == ROWS
            _wait(lambda: {"LeptonDrift", "LeptonTelemetryDropping"} <= {*asked.firing()})
            assert asked.firing()["LeptonTelemetryDropping"]["lepton_signal"] == "traces"
            assert "LeptonReplicaDown" not in asked.firing()

            os.kill(told["replica"], signal.SIGKILL)
            labels = _wait(lambda: asked.firing().get("LeptonReplicaDown"))
            assert labels["lepton_model"] == "m"
            assert labels["severity"] == "page"
        assert served.stdin is not None
        served.stdin.close()
        served.wait(LONG_S)
    refusing.close()
