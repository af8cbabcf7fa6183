"""Replicas killed, put to sleep and shared by several models."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import lepton
from lepton.errors import ServingError
from lepton.ingress import BUFFER_BYTES
from lepton.monitoring import count_answers
from lepton.promotion.replacing import Turns
from lepton.serving import App, Service, serve_all, start
from lepton.serving.client import ShortOfMemory
from tests.cluster.world import Load, World, loop, post, request, wait_until

pytestmark = pytest.mark.usefixtures("ray_cluster")


class Pinned(App):
    """Asks for a version by its number, which is never answered at once."""

    @property
    def infer_url(self) -> str:
        return f"{self.url}/v2/models/{self.model}/versions/1/infer"


def test_a_killed_replicas_requests_are_sent_to_another(world: World) -> None:
    run = lepton.train(loop, world.table.stream(batch_size=50), name="two", home=world.home)
    for _ in range(2):
        lepton.register(run, "two", metrics={}, home=world.home)
    app = lepton.promote("two", 1, home=world.home, replicas=2)
    plain, pinned = copy.copy(world), copy.copy(world)
    plain.app, pinned.app = app, Pinned("two", app.url)
    killed: set[str] = set()

    def kill_one(loads: list[Load]) -> None:
        # both are known to HAProxy once both have answered
        wait_until(lambda: len(_answering(loads) - killed) == 2)
        victim = min(_answering(loads) - killed)
        os.kill(int(victim), signal.SIGKILL)
        killed.add(victim)

    with contextlib.ExitStack() as stack:
        loads = [stack.enter_context(Load(one)) for one in (plain, plain, pinned)]
        kill_one(loads)
        loads[0].more(50)
    with contextlib.ExitStack() as stack:
        loads += [stack.enter_context(Load(plain)) for _ in range(2)]
        kill_one(loads[3:])
        lepton.promote("two", 2, home=world.home)  # its successor takes that up
        loads[3].more(50)

    assert [f for load in loads for f in load.failed] == []
    assert [load.cut for load in loads] == [0] * len(loads)
    assert loads[3].versions[-1] == "2"
    app.close()


def wide_loop(worker: Any) -> None:
    net = torch.nn.Linear(64, 2)
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
    for batch in worker.batches():
        worker.step(net(batch["x"]).square().sum())


def test_a_request_too_large_for_the_ingress_to_send_again_is_by_the_caller(world: World) -> None:
    x = np.random.default_rng(0).normal(size=(500, 64)).astype("float32")
    table = lepton.write(pa.table({"x": list(x)}), f"{world.home}/lake/wide")
    run = lepton.train(wide_loop, table.stream(batch_size=50), name="wide", home=world.home)
    model = lepton.register(run, "wide", metrics={}, home=world.home)
    app = lepton.promote(model, home=world.home, replicas=2)
    assert x.nbytes > BUFFER_BYTES
    answers = [app.predict({"x": x})["output"]]
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            answers.append(app.predict({"x": x})["output"])

    def more() -> None:
        until = len(answers) + 30
        wait_until(lambda: len(answers) > until or any(a.done() for a in asking))

    with ThreadPoolExecutor(2) as threads:
        asking = [threads.submit(ask) for _ in range(2)]
        try:
            wait_until(lambda: len({app.reached() for _ in range(20)} - {""}) == 2)
            more()
            os.kill(int(next(filter(None, iter(app.reached, None)))), signal.SIGKILL)
            more()
        finally:
            done.set()
        for one in asking:
            one.result(120)
    app.close()

    assert all(np.array_equal(answer, answers[0]) for answer in answers)


def test_the_last_replica_sleeps_and_the_next_request_wakes_one(world: World) -> None:
    run = lepton.train(loop, world.table.stream(batch_size=50), name="sleepy", home=world.home)
    first = lepton.register(run, "sleepy", home=world.home)
    # time enough to see it before it sleeps, however busy the machine
    how: dict[str, Any] = {"replicas": (0, 1), "service": Service(sleep_after_s=3)}
    app = lepton.promote(first, home=world.home, **how)
    awake = app.state()
    wait_until(lambda: not app.replicas())
    wait_until(lambda: app.state() == "asleep")
    woken = post(app, request(world))
    wait_until(lambda: not app.replicas())
    second = lepton.register(run, "sleepy", home=world.home)
    app = lepton.promote(second, home=world.home)  # a replica has to prove that it can load it
    after = post(app, request(world))
    app.close()

    assert awake == "ready"
    assert app.state() == "closed"
    assert (woken.status_code, woken.headers["x-lepton-version"]) == (200, "1")
    assert (after.status_code, after.headers["x-lepton-version"]) == (200, "2")


def test_two_versions_that_do_not_fit_are_replaced_one_replica_after_another(
    world: World,
) -> None:
    """The net's weights are 32 bytes; under load, with one replica at first and then with two."""
    for seed in range(3):
        stream = world.table.stream(batch_size=50, seed=seed)
        run = lepton.train(loop, stream, name=f"large{seed}", home=world.home)
        lepton.register(run, "large", home=world.home)
    other = copy.copy(world)
    service = Service(weights_bytes=48)
    other.app = lepton.promote("large", 1, home=world.home, replicas=(1, 2), service=service)
    told: list[str] = []
    with contextlib.ExitStack() as stack:
        loads = [stack.enter_context(Load(other)) for _ in range(2)]
        loads[0].more(20)
        lepton.promote("large", 2, home=world.home, on_change=told.append)
        loads[0].more(20)
        with pytest.raises(ShortOfMemory, match="promote it without canary= and shadow="):
            lepton.promote("large", 3, canary=0.5, home=world.home)
        lepton.promote("large", 3, home=world.home)
        loads[0].more(20)
        lepton.rollback("large", home=world.home)
        loads[0].more(20)
    serving = {r["champion"] for r in other.app.replicas()}
    other.app.close()

    assert [f for load in loads for f in load.failed] == []
    assert loads[0].versions[-1] == "2"
    assert set(loads[0].versions) == {"1", "2", "3"}
    assert serving == {2}
    assert "version 2 in 1 of 2 replicas, one by one" in told
    history = world.registry.history("large")
    record = [(e.version, e.details["surge"]) for e in history if e.kind == "replaced"]
    assert record[0] == (2, True)
    assert [version for version, _ in record] == [2, 3, 2]
    assert all("does not fit into memory" in e.reason for e in history if e.kind == "replaced")


def test_new_code_takes_over_and_no_request_fails(world: World) -> None:
    before = {r["id"] for r in world.app.replicas()}
    with Load(world) as load:
        load.more(10)
        again = start("m", world.home, replicas=(1, 2), upgrade=True)
        wait_until(lambda: not before & {r["id"] for r in world.app.replicas()})
        load.more(20)

    assert again == world.app
    assert load.failed == []
    assert len(set(load.replicas)) >= 2


def test_a_replica_alone_is_not_let_go_of(world: World) -> None:
    class Alone(App):
        """An application with one replica, which may have no other and refuses a version."""

        def replicas(self) -> list[dict[str, Any]]:
            refused = {"error": "it does not fit", "short": True, "seq": 9, "most": 1}
            return [{"id": "a", "pid": 1, **refused}]

    turns = Turns(app=Alone("m", world.app.url), registry=world.registry, tell=print)
    with pytest.raises(
        ShortOfMemory, match=r"it does not fit; with one replica .* replicas=\(1, 2\)"
    ):
        turns.settle(world.registry.state("m"))


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
        with pytest.raises(ServingError, match=r"serve_all\(\['left', 'right'\], home, upgrade"):
            start("right", world.home, upgrade=True)
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
