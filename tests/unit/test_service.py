"""Settings of an application: checked before anything starts, and passed on as Ray wants them."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch

from lepton.errors import ServingError
from lepton.serving import Service
from lepton.serving.devices import device_for
from lepton.serving.running import state_of
from lepton.serving.scaling import replicas_for
from lepton.serving.service import POLICY, replicas_of, service_of


@pytest.mark.parametrize(
    ("given", "pair"), [(1, (1, 1)), (3, (3, 3)), ((0, 4), (0, 4)), ([1, 2], (1, 2))]
)
def test_replicas_are_a_number_or_bounds(given: Any, pair: tuple[int, int]) -> None:
    assert replicas_of(given, Service()) == pair


@pytest.mark.parametrize("given", [0, -1, True, (2, 1), (0, 0), (-1, 1), (1, 2, 3), (1.0, 2)])
def test_other_replicas_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="must be a number of at least 1, or"):
        replicas_of(given)


def test_who_speaks_grpc_does_not_sleep() -> None:
    with pytest.raises(ValueError, match=r"say replicas=\(1, 4\)"):
        replicas_of((0, 4), Service(grpc_port=0))


@pytest.mark.parametrize(
    ("resources", "options"),
    [
        ({}, {"num_cpus": 0.5}),
        ({"CPU": 2}, {"num_cpus": 2}),
        ({"GPU": 0.25}, {"num_cpus": 0.5, "num_gpus": 0.25}),
        (
            {"CPU": 1, "memory": 1e9, "edge": 1},
            {"num_cpus": 1, "memory": 1e9, "resources": {"edge": 1}},
        ),
    ],
)
def test_resources_are_told_to_ray(resources: Any, options: Any) -> None:
    assert Service(resources=resources).actor_options == options


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"grow_after_s": -1}, "must be at least 0"),
        ({"sleep_after_s": math.inf}, "must be at least 0"),
        ({"ongoing": 0}, "ongoing"),
        ({"ongoing": math.nan}, "ongoing"),
        ({"resources": {"GPU": -1}}, "must be numbers of at least 0"),
        ({"grpc_port": 2**16}, "must be a port"),
        ({"policy": lambda _: (1, {})}, "must be a function of a module"),
        ({"policy": "scaling"}, "or 'module:function'"),
        ({"policy": 3}, "must be a function of a module"),
        ({"device": "cuda"}, "needs a GPU that Ray keeps"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Service(**wrong)


def test_settings_travel() -> None:
    service = service_of({"policy": POLICY, "ongoing": 2, "resources": {"CPU": 1}})
    assert pickle.loads(pickle.dumps(service)) == service
    own = Service(policy=replicas_for)
    assert pickle.loads(pickle.dumps(own)) == own


def test_nets_compute_where_the_service_says(caplog: pytest.LogCaptureFixture) -> None:
    assert device_for(Service()) == "cpu"
    assert device_for(Service(device="cpu:0")) == "cpu:0"
    with pytest.raises(ServingError, match="device 'warp' cannot be used here"):
        device_for(Service(device="warp"))
    if torch.cuda.is_available():
        assert device_for(Service(resources={"GPU": 1})) == "cuda"
        return
    assert device_for(Service(resources={"GPU": 0.25})) == "cpu"
    assert "this replica has 0.25 of a GPU by Ray" in caplog.text
    with pytest.raises(ServingError, match="device 'cuda' cannot be used here"):
        device_for(Service(device="cuda", resources={"GPU": 0.25}))


@pytest.mark.parametrize(
    ("application", "replicas", "state"),
    [
        ("DEPLOYING", set(), "starting"),
        ("DEPLOYING", {"STARTING"}, "starting"),
        ("RUNNING", {"RUNNING", "STARTING"}, "ready"),
        ("RUNNING", {"PENDING_MIGRATION"}, "ready"),
        ("UNHEALTHY", {"RUNNING"}, "ready"),
        ("UNHEALTHY", {"STARTING"}, "starting"),
        ("RUNNING", {"RECOVERING"}, "starting"),
        ("RUNNING", {"STOPPING"}, "asleep"),
        ("RUNNING", set(), "asleep"),
        ("DEPLOY_FAILED", set(), "failed"),
        ("UNHEALTHY", {"STOPPING"}, "failed"),
        ("DELETING", {"RUNNING"}, "draining"),
    ],
)
def test_an_applications_state_is_told_by_its_replicas(
    application: str, replicas: set[str], state: str
) -> None:
    assert state_of(application, replicas) == state
