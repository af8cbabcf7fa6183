"""The demo's trace in a receiver with a user interface: Arize Phoenix, asked by its own API.

Phoenix is 850 MB and wants an environment of its own: `make phoenix` makes one.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from lepton.telemetry import spans_of

OWN = Path(sys.prefix) / "phoenix" / "bin" / "phoenix"
PHOENIX = os.environ.get("LEPTON_PHOENIX") or shutil.which("phoenix") or str(OWN)
LONG_S = 300

pytestmark = pytest.mark.skipif(
    not Path(PHOENIX).is_file(), reason="no Phoenix: `make phoenix` installs it (850 MB)"
)


@pytest.fixture
def phoenix(tmp_path: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("", 0)) as two:
        ports = [s.getsockname()[1] for s in (one, two)]
    url = f"http://127.0.0.1:{ports[0]}"
    environment = {
        **os.environ,
        "PHOENIX_WORKING_DIR": str(tmp_path / "phoenix"),
        "PHOENIX_HOST": "127.0.0.1",
        "PHOENIX_PORT": str(ports[0]),
        "PHOENIX_GRPC_PORT": str(ports[1]),
        "PHOENIX_TELEMETRY_ENABLED": "false",
    }
    environment.pop("PYTHONPATH", None)  # it has packages of its own
    process = subprocess.Popen(
        [PHOENIX, "serve"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + LONG_S
        while not _is_up(url):
            assert process.poll() is None, f"{PHOENIX} serve ended"
            assert time.monotonic() < end
            time.sleep(0.2)
        yield url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def _is_up(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/healthz", timeout=10).status_code == 200
    return False


def _spans(url: str) -> list[dict[str, Any]]:
    """Every span that Phoenix has."""
    found: list[dict[str, Any]] = []
    cursor: str | None = None
    while True:
        asked = {"limit": 500, **({"cursor": cursor} if cursor else {})}
        reply = httpx.get(f"{url}/v1/projects/default/spans", params=asked, timeout=180)
        if reply.status_code == 404:  # nothing came yet
            return []
        body = reply.raise_for_status().json()
        found += body["data"]
        cursor = body["next_cursor"]
        if not cursor:
            return found


def test_the_demos_trace_is_whole_in_phoenix(phoenix: str, tmp_path: Path) -> None:
    home = tmp_path / "demo"
    environment = {**os.environ, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{phoenix}/v1/traces"}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-m", "lepton.cli", "demo", "--out", str(home)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr

    kept = {s.span_id: s for s in spans_of(str(home / "traces"))}
    (root,) = [s for s in kept.values() if s.name == "lepton.demo"]
    end = time.monotonic() + LONG_S
    while root.span_id not in {s["context"]["span_id"] for s in _spans(phoenix)}:
        assert time.monotonic() < end, "the root never came"
        time.sleep(0.5)
    shown = {s["context"]["span_id"]: s for s in _spans(phoenix)}

    assert {s["context"]["trace_id"] for s in shown.values()} == {root.trace_id}
    orphans = [s["name"] for s in shown.values() if s["parent_id"] not in {None, *shown}]
    assert orphans == []
    assert [s["name"] for s in shown.values() if s["parent_id"] is None] == ["lepton.demo"]
    assert set(shown) <= set(kept)
    lost = {kept[i].name for i in set(kept) - set(shown)}
    assert lost <= {
        "lepton.read",
        "lepton.steps",
        "lepton.slow_step",
    }  # the killed worker's last interval
    counts = [Counter(s["name"] for s in shown.values()), Counter(s.name for s in kept.values())]
    assert counts[0]["lepton.request"] == counts[1]["lepton.request"] > 0
    assert counts[0]["lepton.train.failure"] == counts[1]["lepton.train.failure"] > 0
    for name, value in kept[root.span_id].attributes.items():
        assert shown[root.span_id]["attributes"][name] == value
