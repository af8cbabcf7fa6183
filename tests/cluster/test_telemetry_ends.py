"""Ray's workers that end by SIGTERM, or because nobody needs them any more, send what waits."""

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from lepton import telemetry
from lepton.telemetry import Carrier
from tests.cluster.world import wait_until
from tests.unit.collector import Collector, attributes_of

SPANS = 3


class Actor:
    """Records spans, and may have a task that does not end."""

    def leave(self, name: str) -> int:
        _leave(name)
        return os.getpid()

    def stay(self, sign: Path) -> None:
        sign.touch()
        threading.Event().wait()


class Async:
    """As Serve's replicas are."""

    async def leave(self, name: str) -> int:
        _leave(name)
        return os.getpid()


def _leave(name: str) -> None:
    for n in range(SPANS):
        about = {"lepton.worker": name, "lepton.step": n}
        telemetry.record("lepton.read", Carrier(), 1, 2, attributes=about)
    telemetry.measure("lepton.read.rows", 1)


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.close()


@pytest.mark.parametrize("kind", [Actor, Async])
@pytest.mark.parametrize("how", ["sigterm", "sigterm at work", "let go"])
def test_an_actor_that_ends_sends_what_waits(
    kind: type[Any], how: str, collector: Collector, ray_cluster: None, tmp_path: Path
) -> None:
    if how == "sigterm at work" and kind is Async:
        pytest.skip("its main thread is never at work")
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "3600000",
        "OTEL_METRIC_EXPORT_INTERVAL": "3600000",
    }
    options = {"num_cpus": 0, "runtime_env": {"env_vars": variables}}
    actor: Any = ray.remote(kind).options(**options).remote()
    pid = ray.get(actor.leave.remote(how))
    assert not collector.spans()
    if how == "let go":
        del actor
    else:
        if how == "sigterm at work":
            actor.stay.remote(tmp_path / "stays")
            wait_until((tmp_path / "stays").exists)
        os.kill(pid, signal.SIGTERM)

    assert collector.wait_for(lambda c: len(c.spans()) >= SPANS)
    assert collector.wait_for(lambda c: "lepton.read.rows" in c.metrics())
    assert Counter(attributes_of(s)["lepton.worker"] for s in collector.spans()) == {how: SPANS}
