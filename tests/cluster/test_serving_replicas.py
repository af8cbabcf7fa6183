"""Replicas killed, put to sleep and shared by several models."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
from typing import Any

import numpy as np
import pytest

import lepton
from lepton.errors import ServingError
from lepton.monitoring import count_answers
from lepton.serving import Service, serve_all
from tests.cluster.world import Load, World, loop, post, request, wait_until

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_a_killed_replicas_requests_are_sent_to_another(world: World) -> None:
    run = lepton.train(loop, world.table.stream(batch_size=50), name="two", home=world.home)
    model = lepton.register(run, "two", metrics={}, home=world.home)
    app = lepton.promote(model, home=world.home, replicas=2)
    other = copy.copy(world)
    other.app = app
    with contextlib.ExitStack() as stack:
        loads = [stack.enter_context(Load(other)) for _ in range(3)]
        killed: set[str] = set()
        for _ in range(2):
            # both are known to HAProxy once both have answered
            wait_until(lambda: len(_answering(loads) - killed) == 2)
            victim = min(_answering(loads) - killed)
            os.kill(int(victim), signal.SIGKILL)
            killed.add(victim)
            loads[0].more(50)

    assert [f for load in loads for f in load.failed] == []
    assert sum(load.cut for load in loads) <= 2 * len(loads)
    app.close()


def test_the_last_replica_sleeps_and_the_next_request_wakes_one(world: World) -> None:
    run = lepton.train(loop, world.table.stream(batch_size=50), name="sleepy", home=world.home)
    first = lepton.register(run, "sleepy", home=world.home)
    # time enough to see it before it sleeps, however busy the machine
    how: dict[str, Any] = {"replicas": (0, 1), "service": Service(sleep_after_s=3)}
    app = lepton.promote(first, home=world.home, **how)
    wait_until(lambda: not app.replicas())
    woken = post(app, request(world))
    wait_until(lambda: not app.replicas())
    second = lepton.register(run, "sleepy", home=world.home)
    app = lepton.promote(second, home=world.home)  # a replica has to prove that it can load it
    after = post(app, request(world))
    app.close()

    assert (woken.status_code, woken.headers["x-lepton-version"]) == (200, "1")
    assert (after.status_code, after.headers["x-lepton-version"]) == (200, "2")


def by_grpc(address: str, model: str, world: World) -> str:
    """Return the version that answers over a new connection, or an empty string for a failure."""
    triton = pytest.importorskip("tritonclient.grpc")
    x = np.array(world.table.head(1).column("x").to_pylist(), "float32")
    sent = triton.InferInput("x", list(x.shape), "FP32")
    sent.set_data_from_numpy(x)
    try:
        with triton.InferenceServerClient(address) as client:
            return str(client.infer(model, [sent], client_timeout=60).get_response().model_version)
    except triton.InferenceServerException:
        return ""


def always_two(_: Any) -> tuple[int, dict[str, Any]]:
    """A policy of one's own."""
    return 2, {}


def test_several_models_share_replicas_and_are_promoted_each_by_itself(world: World) -> None:
    rows = world.table.head(3)
    for seed, name in enumerate(("left", "right", "left", "right")):
        stream = world.table.stream(batch_size=50, seed=seed)
        run = lepton.train(loop, stream, name=f"{name}{seed}", home=world.home)
        lepton.register(run, name, home=world.home)
    for name in ("left", "right"):
        world.registry.promote(name, 1, expect=None)
    service = Service(policy=always_two, grpc_port=0)
    apps = serve_all(["left", "right"], world.home, replicas=(1, 2), service=service)
    try:
        wait_until(lambda: len(apps["left"].replicas()) == 2)
        before = {name: app.predict(rows)["output"] for name, app in apps.items()}
        pids = {r["pid"] for app in apps.values() for r in app.replicas()}
        right = lepton.promote("right", 2, home=world.home)
        after = {name: app.predict(rows)["output"] for name, app in apps.items()}
        versions = {
            n: post(app, request(world)).headers["x-lepton-version"] for n, app in apps.items()
        }
        with pytest.raises(ServingError, match=r"is served by application 'lepton-left\+right'"):
            serve_all(["left", "m"], world.home)
        for app in apps.values():
            app.flush()
        counts = [count_answers(name, world.home) for name in apps]
        address = right.grpc_address
        os.kill(min(pids), signal.SIGKILL)  # the other one listens on the same port
        wait_until(lambda: by_grpc(address, "right", world) == "2")
        wait_until(lambda: by_grpc(address, "left", world) == "1")
    finally:
        apps["left"].close()

    assert len(pids) == 2
    assert right == apps["right"]
    assert versions == {"left": "1", "right": "2"}
    assert np.array_equal(before["left"], after["left"])
    assert not np.array_equal(before["right"], after["right"])
    assert counts == [3, 3]


def _answering(loads: list[Load]) -> set[str]:
    """The replicas that the newest answers came from."""
    return {replica for load in loads for replica in load.replicas[-50:]}
