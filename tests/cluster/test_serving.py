"""Promotion and serving with a real Ray Serve and real HTTP clients."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from safetensors.torch import load_file

import lepton
import lepton.promotion
from lepton import checkpoints
from lepton.errors import CheckpointError, ConflictError, GateError, ServingError
from lepton.lake import Snapshot
from lepton.monitoring import count_answers
from lepton.preprocess import Preparation
from lepton.promotion import CanaryRule
from lepton.registry import Registry
from lepton.serving import Service, score, serve_all
from lepton.serving.protocol import request_of

pytestmark = pytest.mark.usefixtures("ray_cluster")


def loop(worker: Any) -> None:
    torch.manual_seed(worker.step_number)
    net = torch.nn.Linear(3, 2)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    worker.attach(net=net, opt=opt)
    for batch in worker.batches():
        scores = net(batch["x"])
        worker.step(torch.nn.functional.cross_entropy(scores, batch["y"], reduction="sum"))


class World:
    """A table, three registered versions and the home they live in."""

    def __init__(self, home: Path) -> None:
        self.home = str(home)
        x = np.random.default_rng(0).normal(5, 2, (600, 3)).astype("float32")
        y = (x.sum(1) > 15).astype("int64")
        rows = pa.table({"x": list(x), "y": y})
        self.table: Snapshot = lepton.write(rows, home / "lake" / "t")
        prepare = Preparation.fit(self.table, standard=["x"])
        self.versions = []
        for seed in range(4):
            stream = self.table.stream(batch_size=50, epochs=2, seed=seed, transform=prepare)
            run = lepton.train(loop, stream, name=f"r{seed}", home=self.home)
            found = lepton.evaluate(run, self.table, label="y", home=self.home)
            self.versions.append(lepton.register(run, "m", metrics=found.metrics, home=self.home))
        self.registry = Registry(f"{self.home}/registry")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> World:
    found = World(tmp_path_factory.mktemp("serving"))
    app = lepton.promote(found.versions[0], home=found.home, replicas=(1, 2))
    found.app = app  # type: ignore[attr-defined]
    return found


def post(app: Any, body: str | bytes) -> httpx.Response:
    return httpx.post(app.infer_url, content=body, timeout=30)


def test_answers_are_those_of_the_checkpoint_and_are_logged(world: World) -> None:
    rows = world.table.head(7)
    before = count_answers("m", world.home)
    served = world.app.predict(rows)["output"]

    from lepton.export.restore import Predictor

    manifest = checkpoints.load(world.versions[0].checkpoint)
    assert np.array_equal(served, Predictor(manifest)(rows)["output"].numpy())
    wait_until(lambda: count_answers("m", world.home) == before + 1)
    log = lepton.table(f"{world.home}/answers/m").to_arrow().to_pandas()
    assert len(log[log["row"] == 6]) == 1


@pytest.mark.parametrize(
    "body",
    [
        "no json",
        "[]",
        "{}",
        '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}',
        '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, "a"]}]}',
        '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, NaN]}]}',
        '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, null]}]}',
        '{"inputs": [{"name": "x", "datatype": "INT64", "shape": [1, 3], "data": [1, 2, 3]}]}',
        '{"inputs": [{"name": "q", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}]}',
    ],
)
def test_a_wrong_request_is_told_what_was_expected(world: World, body: str) -> None:
    reply = post(world.app, body)

    assert reply.status_code == 400
    assert "error" in reply.json()


def test_a_canary_takes_over_under_load_and_no_request_fails(world: World) -> None:
    with Load(world) as load:
        lepton.promote(
            world.versions[1],
            canary=0.3,
            rule=CanaryRule(bake_s=1, min_requests=10),
            gate="accuracy >= 0",
            home=world.home,
        )
        load.more(20)

    assert load.failed == []
    assert set(load.versions) == {"1", "2"}
    assert load.versions[-10:] == ["2"] * 10
    assert world.registry.state("m").pointer.champion == 2


def test_a_broken_checkpoint_harms_no_request(world: World) -> None:
    broken = world.versions[2]
    manifest = checkpoints.load(broken.checkpoint)
    state = manifest.path(checkpoints.STATE)
    whole = state.read_bytes()
    before = world.registry.state("m").pointer
    with Load(world) as load:
        state.write_bytes(whole[:-8])
        with pytest.raises(CheckpointError, match="does not match its hash"):
            lepton.promote(broken, home=world.home)
        # somebody else's promotion went past that check: the replicas must refuse by themselves
        moved = world.registry.promote("m", broken.version, expect=before.seq)
        with pytest.raises(ServingError, match="does not match its hash"):
            world.app.wait_for(moved.pointer.seq)
        load.more(20)
    state.write_bytes(whole)
    back = world.registry.rollback("m", expect=moved.pointer.seq, reason="broken")
    world.app.wait_for(back.pointer.seq)

    assert load.failed == []
    assert set(load.versions) == {str(before.champion)}


def test_a_version_that_answers_otherwise_than_in_training_never_answers(world: World) -> None:
    good = checkpoints.load(world.versions[1].checkpoint)
    state = checkpoints.restore(good)
    state["net"]["weight"] = -state["net"]["weight"]
    wrong = checkpoints.write(
        Path(world.home) / "wrong",
        checkpoints.flatten(state),
        step=good.step,
        cursor=good.cursor,
        program=good.path(checkpoints.PROGRAM),
        answers=load_file(good.path(checkpoints.ANSWERS)),
        lineage=good.lineage,
        preparation=good.preparation,
        signature=good.signature,
    )
    about = {"lineage": dict(good.lineage), "signature": dict(good.signature or {})}
    entry = world.registry.register(
        "m", checkpoint=wrong.uri, manifest_sha256=wrong.sha256, **about
    )
    before = world.registry.state("m").pointer
    with Load(world) as load:
        with pytest.raises(ServingError, match="answers otherwise than it did in training"):
            lepton.promote(entry, home=world.home)
        load.more(20)
    after = world.registry.state("m").pointer

    assert load.failed == []
    assert set(load.versions) == {str(before.champion)}
    assert after.champion == before.champion
    assert "answers otherwise" in world.registry.history("m")[-1].reason


def test_a_failing_canary_is_rolled_back_by_itself(world: World) -> None:
    champion = world.registry.state("m").pointer.champion
    rule = CanaryRule(bake_s=30, min_requests=5, max_error_rate=0, max_latency_ratio=1e-9)
    with Load(world) as load, pytest.raises(ServingError, match="was rolled back: p99 latency"):
        lepton.promote(world.versions[3], canary=0.5, rule=rule, home=world.home)

    pointer = world.registry.state("m").pointer
    assert (pointer.champion, pointer.canary) == (champion, None)
    assert world.registry.history("m")[-1].kind == "aborted"
    assert load.failed == []


def test_rollback_brings_the_former_champion_back(world: World) -> None:
    before = world.registry.state("m").pointer
    lepton.promote(world.versions[3], home=world.home)
    state = lepton.rollback("m", home=world.home)

    assert state.pointer.champion == before.champion
    reply = post(world.app, request(world))
    assert reply.json()["model_version"] == str(before.champion)


def test_a_gate_that_fails_changes_nothing(world: World) -> None:
    before = world.registry.state("m").pointer
    with pytest.raises(GateError, match="did not pass"):
        lepton.promote(world.versions[3], gate="accuracy > 1.5", home=world.home)
    with pytest.raises(ConflictError):
        world.registry.promote("m", 4, expect=before.seq - 1)

    assert world.registry.state("m").pointer == before


def test_a_request_continues_the_callers_trace(world: World) -> None:
    header = f"00-{'ab' * 16}-{'cd' * 8}-01"
    reply = httpx.post(
        world.app.infer_url, content=request(world), headers={"traceparent": header}, timeout=30
    )

    assert reply.headers["traceparent"].split("-")[1] == "ab" * 16


INPUTS = [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]


def request(world: World) -> bytes:
    return request_of(world.table.select(["x"]).head(1), INPUTS)


def wait_until(condition: Any) -> None:
    done = threading.Event()
    for _ in range(1200):
        if condition():
            return
        done.wait(0.1)
    raise AssertionError("waited two minutes in vain")


class Load:
    """A client that keeps asking from another thread and notes every answer."""

    def __init__(self, world: World, rows: np.ndarray[Any, Any] | None = None) -> None:
        self._world = world
        self._rows = rows
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self.versions: list[str] = []
        self.replicas: list[str] = []
        self.failed: list[str] = []
        self.cut = 0

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def more(self, requests: int) -> None:
        until = len(self.versions) + requests
        wait_until(lambda: len(self.versions) >= until or self.failed)

    def _ask(self) -> None:
        body, at = request(self._world), 0
        with httpx.Client(timeout=90) as http:
            while not self._stop.is_set():
                if self._rows is not None:
                    body = request_of(pa.table({"x": [self._rows[at % len(self._rows)]]}), INPUTS)
                    at += 1
                began = time.monotonic()
                try:
                    reply = http.post(self._world.app.infer_url, content=body)
                except httpx.HTTPError as e:
                    if "complete message body" in str(e):
                        self.cut += 1  # the replica died between its headers and its body
                        continue
                    waited = time.monotonic() - began
                    self.failed.append(f"{type(e).__name__} after {waited:.1f} s: {e}")
                    continue
                if reply.status_code == 200:
                    self.versions.append(reply.json()["model_version"])
                    self.replicas.append(reply.headers["x-lepton-replica"])
                else:
                    self.failed.append(reply.text)


def test_any_form_of_rows_gets_the_same_answer(world: World) -> None:
    rows = world.table.select(["x"]).head(5)
    expected = world.app.predict(rows)["output"]
    x = np.array(rows["x"].to_pylist(), "float32")

    for given in (rows.to_pandas(), {"x": x}, {"x": torch.from_numpy(x)}, {"x": x.tolist()}):
        assert np.array_equal(world.app.predict(given)["output"], expected)
    with pytest.raises(ServingError, match=r"rows of shape \(2,\), wanted \(3,\)"):
        world.app.predict({"x": x[:, :2]})
    with pytest.raises(ServingError, match=r"\['x'\], which are not given"):
        world.app.predict({"y": x})


def test_after_a_flush_the_log_has_every_answer(world: World) -> None:
    world.app.flush()
    before = count_answers("m", world.home)
    for _ in range(3):
        world.app.predict(world.table.head(2))
    world.app.flush()

    assert count_answers("m", world.home) == before + 3


def test_a_whole_table_is_answered_by_the_same_code(world: World, tmp_path: Path) -> None:
    from lepton.export.restore import Predictor

    rows = world.table.where("y = 1")
    once = ("nightly", 1)
    for _ in range(2):
        found = score("m", rows, tmp_path / "out", version=2, txn=once, home=world.home)
    predictor = Predictor(checkpoints.load(world.versions[1].checkpoint))
    expected = predictor(rows.to_arrow())["output"].numpy()

    table = found.to_arrow()
    assert len(table) == rows.count_rows() < world.table.count_rows()
    assert set(table["model_version"].to_pylist()) == {2}
    order = np.argsort([tuple(x) for x in table["x"].to_pylist()], axis=0)[:, 0]
    mine = np.argsort([tuple(x) for x in rows.to_arrow()["x"].to_pylist()], axis=0)[:, 0]
    answers = np.array(table["answer_output"].to_pylist())
    assert np.allclose(answers[order], expected[mine], atol=1e-6)
    with pytest.raises(ServingError, match=r"takes columns \['x'\]"):
        score("m", world.table.select(["y"]), tmp_path / "no", home=world.home)
    with pytest.raises(ServingError, match="already"):
        score("m", found, tmp_path / "no", home=world.home)


def test_the_same_user_gets_the_same_version(world: World) -> None:
    pointer = world.registry.state("m").pointer
    other = next(v.version for v in world.versions if v.version != pointer.champion)
    state = world.registry.start_canary("m", other, 0.5, expect=pointer.seq, by="X-User")
    world.app.wait_for(state.pointer.seq)
    body = request(world)
    got: dict[str, set[str]] = {}
    with httpx.Client(timeout=30) as http:
        for user in [f"user-{i}" for i in range(20)] * 3:
            reply = http.post(world.app.infer_url, content=body, headers={"x-user": user})
            got.setdefault(user, set()).add(reply.json()["model_version"])
    lepton.rollback("m", home=world.home)

    assert {len(versions) for versions in got.values()} == {1}
    assert set.union(*got.values()) == {str(pointer.champion), str(other)}


def test_a_shadow_is_asked_and_compared_and_never_answers(world: World) -> None:
    champion = world.registry.state("m").pointer.champion
    other = next(v for v in world.versions if v.version != champion)
    rule = CanaryRule(bake_s=0, min_requests=20, max_difference=0.0)
    asked = np.random.default_rng(0).normal(5, 2, (4000, 3)).astype("float32")
    with Load(world, rows=asked) as load:
        # two nets of other seeds do not agree on every row of many
        with pytest.raises(ServingError, match=r"answers are .* from the champion's"):
            lepton.promote(
                other, shadow=1.0, rule=replace(rule, patience_s=120, bake_s=100), home=world.home
            )
        assert set(load.versions) == {str(champion)}
        lepton.promote(other, shadow=1.0, rule=replace(rule, max_difference=1.0), home=world.home)
        load.more(20)

    assert load.failed == []
    assert load.versions[-1] == str(other.version)
    world.app.flush()
    log = lepton.table(f"{world.home}/answers/m").to_arrow().to_pandas()
    shadows = log[log["variant"] == "shadow"]
    assert set(shadows["version"]) == {other.version}
    assert set(shadows["request_id"]) < set(log[log["variant"] == "champion"]["request_id"])
    lepton.rollback("m", home=world.home)


def test_whoever_promotes_again_carries_on_after_the_controller_was_killed(world: World) -> None:
    champion = world.registry.state("m").pointer.champion
    other = next(v.version for v in world.versions if v.version != champion)
    spawn = multiprocessing.get_context("spawn")
    with Load(world) as load:
        args = (other, world.home, ray.get_runtime_context().gcs_address)
        controller = spawn.Process(target=_promote_elsewhere, args=args, daemon=True)
        controller.start()
        wait_until(lambda: world.registry.state("m").pointer.canary == other)
        began = world.registry.state("m").pointer.seq
        controller.kill()
        controller.join()
        load.more(30)
        told: list[str] = []
        lepton.promote("m", other, canary=0.5, home=world.home, on_change=told.append)
        load.more(20)

    assert load.failed == []
    assert told == [f"version {other}: its canary goes on", f"version {other} at 100 %"]
    last = world.registry.history("m")[-2:]
    assert [(e.kind, e.seq) for e in last] == [("canary", began), ("promoted", began + 1)]
    assert load.versions[-1] == str(other)
    lepton.rollback("m", home=world.home)


def _promote_elsewhere(version: int, home: str, address: str) -> None:
    os.environ["RAY_ADDRESS"] = address
    rule = CanaryRule(bake_s=4, min_requests=5)
    lepton.promote("m", version, canary=0.5, rule=rule, home=home)


def test_a_trial_that_is_ended_by_hand_ends_its_promotion(world: World) -> None:
    champion = world.registry.state("m").pointer.champion
    other = next(v.version for v in world.versions if v.version != champion)
    paused: list[int | None] = []

    def end() -> None:
        wait_until(lambda: world.registry.state("m").pointer.canary == other)
        paused.append(lepton.promotion.pause("m", home=world.home).pointer.trial)
        lepton.rollback("m", reason="not today", home=world.home)

    thread = threading.Thread(target=end)
    thread.start()
    rule = CanaryRule(bake_s=1000, patience_s=2000)
    with pytest.raises(ServingError, match=r"was ended by .*: not today"):
        lepton.promote("m", other, canary=0.5, rule=rule, home=world.home)
    thread.join()

    assert paused == [other]
    assert world.registry.state("m").pointer.champion == champion


def test_a_killed_replicas_requests_are_sent_to_another(world: World) -> None:
    run = lepton.train(loop, world.table.stream(batch_size=50), name="two", home=world.home)
    model = lepton.register(run, "two", metrics={}, home=world.home)
    app = lepton.promote(model, home=world.home, replicas=2)
    other = World.__new__(World)
    other.table, other.app = world.table, app  # type: ignore[attr-defined]
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
    how: dict[str, Any] = {"replicas": (0, 1), "service": Service(sleep_after_s=0.5)}
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
            return str(client.infer(model, [sent], client_timeout=30).get_response().model_version)
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
