"""Ray Serve's own serialization, by two threads at once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest
from ray.serve.config import AutoscalingPolicy

from lepton.serving.running import MOST_TRIES, undisturbed
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
