"""What Ray Serve tells of itself, and its own serialization by two threads at once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest
from ray.serve._private.common import ReplicaState
from ray.serve.config import AutoscalingPolicy
from ray.serve.schema import ApplicationStatus, ProxyStatus

from lepton.serving.running import MOST_TRIES, Seen, seen_in, undisturbed
from lepton.serving.service import POLICY


@pytest.fixture
def often() -> Iterator[None]:
    """Have threads take turns often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("often")
def test_two_threads_may_ask_serve_at_once() -> None:
    errors: list[Exception] = []

    def serialize() -> None:
        for _ in range(2000):
            try:
                undisturbed(lambda: AutoscalingPolicy(policy_function=POLICY))
            except ValueError as e:
                errors.append(e)

    threads = [threading.Thread(target=serialize) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_other_errors_are_raised_at_once_and_this_one_in_the_end() -> None:
    asked: list[str] = []

    def fail(words: str) -> None:
        asked.append(words)
        raise ValueError(words)

    for words, times in (("oh", 1), ("<module> is not registered for pickle by value", MOST_TRIES)):
        asked.clear()
        with pytest.raises(ValueError, match=words):
            undisturbed(lambda words=words: fail(words))
        assert len(asked) == times


def test_what_runs_is_told_by_the_controllers_own_details() -> None:
    replicas = [{"state": ReplicaState.RUNNING}, {"state": "STARTING"}]
    deployments = {
        "replica": {"replicas": replicas, "message": "a reason"},
        "other": {"replicas": [], "message": "another"},
        "silent": {"replicas": [], "message": ""},
    }
    seen = seen_in(
        {
            "applications": {
                "lepton-m": {"status": ApplicationStatus.RUNNING, "deployments": deployments},
                "lepton-new": {"status": "DEPLOYING"},
            },
            "proxies": {"node": {"status": ProxyStatus.HEALTHY}},
        }
    )
    assert [seen.state(n) for n in ("lepton-m", "lepton-new", "none")] == [
        "ready",
        "starting",
        "closed",
    ]
    assert seen.applications["lepton-m"].replicas == {"RUNNING", "STARTING"}
    assert (seen.status("lepton-m"), seen.status("none")) == ("RUNNING", "")
    assert (seen.why("lepton-m"), seen.why("none")) == ("a reason; another", "")
    assert seen.proxies == {"node": "HEALTHY"}
    for told in ({}, {"applications": {}, "proxies": None}):
        assert seen_in(told) == Seen()
