"""The doctor's deep check against a real Ray, always in a process of its own."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from lepton.doctor import check
from lepton.doctor.cluster import cluster, local_ray


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose name leaves room for a socket's path (pytest's own may not)."""
    with tempfile.TemporaryDirectory(prefix="lp", dir="/tmp") as folder:
        yield Path(folder)


def test_a_local_ray_starts_runs_a_task_and_leaves_nothing(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(short))

    found = {c.name: c for c in check(str(tmp_path), deep=True)}

    assert found["local ray"].ok, found["local ray"]
    assert found["local ray"].detail.endswith("42")
    assert list(short.iterdir()) == []


def test_a_ray_that_does_not_start_in_time_is_given_up(short: Path) -> None:
    found = local_ray(str(short), timeout=0.2)

    assert found.level == "fail"
    assert "no answer within" in found.detail
    assert list(short.iterdir()) == []


def test_a_running_ray_is_joined_from_another_process(ray_cluster: None) -> None:
    found = cluster(ray.get_runtime_context().gcs_address, timeout=120)

    assert found.ok, found
    assert found.detail.startswith("1 nodes")
    assert ray.is_initialized()  # the connection of this process is untouched
