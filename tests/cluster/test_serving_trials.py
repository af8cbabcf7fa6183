"""Versions on trial under load: canaries, shadows, rollbacks; no request fails."""

from __future__ import annotations

import multiprocessing
import os
import threading
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pytest
import ray
from safetensors.torch import load_file

import lepton
import lepton.promotion
from lepton import checkpoints
from lepton.errors import CheckpointError, ConflictError, GateError, ServingError
from lepton.export.restore import Predictor
from lepton.promotion import CanaryRule
from tests.cluster.world import Load, World, post, request, wait_until

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_a_canary_takes_over_under_load_and_no_request_fails(world: World) -> None:
    told: list[str] = []
    with Load(world) as load:
        lepton.promote(
            world.versions[1],
            canary=(0.3, 0.6),
            rule=CanaryRule(bake_s=1, min_requests=10),
            gate="accuracy >= 0",
            home=world.home,
            on_change=told.append,
        )
        load.more(20)

    assert load.failed == []
    assert set(load.versions) == {"1", "2"}
    assert load.versions[-10:] == ["2"] * 10
    assert told == ["version 2 at 30%", "version 2 at 60%", "version 2 at 100 %"]
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


def test_the_same_user_gets_the_same_version(world: World) -> None:
    pointer = world.registry.state("m").pointer
    other = next(v.version for v in world.versions if v.version != pointer.champion)
    state = world.registry.start_canary("m", other, 0.5, expect=pointer.seq, by="X-User")
    world.app.wait_for(state.pointer.seq)
    body = request(world)
    got: dict[str, set[str]] = {}
    with httpx.Client(timeout=120) as http:
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
    x = np.random.default_rng(0).normal(5, 2, (20_000, 3)).astype("float32")
    nets = [Predictor(checkpoints.load(v.checkpoint)) for v in (world.champion(), other)]
    one, two = (net(pa.table({"x": list(x)}))["output"].argmax(1).numpy() for net in nets)
    assert (one != two).any()
    with Load(world, rows=x[one != two]) as load:
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
    goes_on = [f"version {other}: its canary goes on"]
    assert told == [*goes_on, f"version {other} at 60%", f"version {other} at 100 %"]
    last = world.registry.history("m")[-3:]
    assert [(e.kind, e.seq - began) for e in last] == [
        ("canary", 0),
        ("canary", 1),
        ("promoted", 2),
    ]
    kept = [{k: v for k, v in e.details.items() if k != "traceparent"} for e in last[:2]]
    assert kept[0] == kept[1]  # its rule and steps, too
    assert last[0].details["traceparent"] != last[1].details["traceparent"]
    assert load.versions[-1] == str(other)
    lepton.rollback("m", home=world.home)


def _promote_elsewhere(version: int, home: str, address: str) -> None:
    os.environ["RAY_ADDRESS"] = address
    rule = CanaryRule(bake_s=4, min_requests=5)
    lepton.promote("m", version, canary=(0.5, 0.6), rule=rule, home=home)


def test_a_trial_that_is_ended_by_hand_ends_its_promotion(world: World) -> None:
    champion = world.registry.state("m").pointer.champion
    other = next(v.version for v in world.versions if v.version != champion)
    paused: list[int | None] = []

    def end() -> None:
        wait_until(lambda: world.registry.state("m").pointer.canary == other)
        paused.append(lepton.promotion.pause("m", home=world.home).pointer.trial)
        lepton.promotion.abort("m", reason="not today", home=world.home)

    thread = threading.Thread(target=end)
    thread.start()
    rule = CanaryRule(bake_s=1000, patience_s=2000)
    with pytest.raises(ServingError, match=r"was ended by .*: not today"):
        lepton.promote("m", other, canary=0.5, rule=rule, home=world.home)
    thread.join()

    assert paused == [other]
    assert world.registry.state("m").pointer.champion == champion
