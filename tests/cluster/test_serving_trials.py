"""Versions on trial under load: canaries, shadows, rollbacks; no request fails."""

from __future__ import annotations

import multiprocessing
import os
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
from lepton.export.restore import Predictor
from lepton.preprocess import Preparation
from lepton.promotion import CanaryRule
from lepton.registry import ModelVersion
from lepton.serving.app import standing
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


def rewritten(world: World, model: str, sign: int) -> ModelVersion:
    """Register a checkpoint with weights of that sign and the answers of training."""
    good = checkpoints.load(world.versions[1].checkpoint)
    state = checkpoints.restore(good)
    state["net"]["weight"] = sign * state["net"]["weight"]
    made = checkpoints.write(
        Path(world.home) / f"rewritten-{model}-{sign}",
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
    return world.registry.register(model, checkpoint=made.uri, manifest_sha256=made.sha256, **about)


def test_a_champion_that_cannot_be_loaded_is_in_nobodys_way(world: World) -> None:
    wrong, right = rewritten(world, "new", -1), rewritten(world, "new", 1)
    with pytest.raises(ServingError, match="did not start"):
        lepton.promote(wrong, home=world.home)
    assert world.registry.state("new").pointer.champion is None
    assert world.registry.history("new")[-1].kind == "withdrawn"
    assert standing("new") == "closed"
    app = lepton.promote(right, home=world.home)
    first = post(app, request(world))
    app.close()
    Path(right.checkpoint).unlink()  # the champion is gone while nobody serves it
    source = world.versions[0]
    about = {"lineage": dict(source.lineage), "signature": dict(source.signature)}
    third = world.registry.register(
        "new",
        checkpoint=source.checkpoint,
        manifest_sha256=source.manifest_sha256,
        **about,
    )
    app = lepton.promote(third, home=world.home)
    second = post(app, request(world))
    app.close()

    versions = [(r.status_code, r.headers["x-lepton-version"]) for r in (first, second)]
    assert versions == [(200, "2"), (200, "3")]


def test_a_version_that_answers_otherwise_than_in_training_never_answers(world: World) -> None:
    entry = rewritten(world, "m", -1)
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


class Brittle(torch.nn.Module):
    """Answers rows such as it was trained on, and fails on any that is far from them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.table = torch.nn.Embedding(64, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.table(x.sum(1).long() + 32)


def brittle_loop(worker: Any) -> None:
    net = Brittle()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    worker.attach(net=net, opt=opt)
    for batch in worker.batches():
        scores = net(batch["x"])
        worker.step(torch.nn.functional.cross_entropy(scores, batch["y"], reduction="sum"))


def test_a_canary_that_really_fails_is_rolled_back_and_nothing_fails_afterwards(
    world: World,
) -> None:
    champion = world.registry.state("m").pointer.champion
    prepare = Preparation.fit(world.table, standard=["x"])
    stream = world.table.stream(batch_size=50, transform=prepare)
    run = lepton.train(brittle_loop, stream, name="brittle", home=world.home)
    brittle = lepton.register(run, "m", home=world.home)
    rows = np.random.default_rng(0).normal(5, 2, (200, 3)).astype("float32")
    rows[::2] *= 1000  # of this its recorded rows had nothing
    rule = CanaryRule(bake_s=100, patience_s=120, min_requests=20, max_error_rate=0.2)
    with Load(world, rows=rows) as load:
        with pytest.raises(ServingError, match=r"was rolled back: \d+ of \d+ requests failed"):
            lepton.promote(brittle, canary=0.5, rule=rule, home=world.home)
        time.sleep(0.2)  # what was under way
        failed, answered = len(load.failed), len(load.versions)
        wait_until(lambda: len(load.versions) >= answered + 100)

    assert len(load.failed) == failed > 0
    assert all("index out of range" in failure for failure in load.failed)
    assert set(load.versions[answered:]) == {str(champion)}
    last = world.registry.history("m")[-1]
    assert (last.kind, world.registry.state("m").pointer.champion) == ("aborted", champion)


def test_a_canary_whose_answers_drift_away_is_rolled_back(world: World) -> None:
    champion = world.registry.state("m").pointer.champion
    other = next(v for v in world.versions if v.version != champion)
    x = np.random.default_rng(0).normal(5, 2, (20_000, 3)).astype("float32")
    nets = [Predictor(checkpoints.load(v.checkpoint)) for v in (world.champion(), other)]
    one, two = (net(pa.table({"x": list(x)}))["output"].argmax(1).numpy() for net in nets)
    kind = np.bincount(one[one != two]).argmax()
    apart = x[(one == kind) & (two != kind)]
    rule = CanaryRule(bake_s=100, patience_s=120, min_requests=20, max_difference=0.5)
    with Load(world, rows=apart) as load:
        with pytest.raises(ServingError, match="rolled back: its answers are 1 from the champion"):
            lepton.promote(other, canary=0.5, rule=rule, home=world.home)
        answered = len(load.versions)
        load.more(50)

    assert load.failed == []
    assert str(other.version) in load.versions[:answered]
    assert set(load.versions[answered + 1 :]) == {str(champion)}
    assert world.registry.state("m").pointer.champion == champion


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
    with Load(world) as load:
        began = _begun_and_killed(world, other, CanaryRule(bake_s=4, min_requests=5))
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


def test_whoever_comes_after_a_killed_controller_rolls_back_by_its_record(world: World) -> None:
    champion = world.registry.state("m").pointer.champion
    other = next(v.version for v in world.versions if v.version != champion)
    rule = CanaryRule(bake_s=100, patience_s=120, min_requests=20, max_latency_ratio=1e-9)
    began = _begun_and_killed(world, other, rule)  # nobody asks yet, so it decided nothing
    told: list[str] = []
    with Load(world) as load:
        with pytest.raises(ServingError, match="was rolled back: p99 latency is"):
            lepton.promote("m", other, canary=0.5, home=world.home, on_change=told.append)
        load.more(20)

    assert load.failed == []
    assert told == [f"version {other}: its canary goes on"]
    last = world.registry.history("m")[-2:]
    assert [(e.kind, e.seq - began) for e in last] == [("canary", 0), ("aborted", 1)]
    assert set(load.versions[-20:]) == {str(champion)}


def _begun_and_killed(world: World, version: int, rule: CanaryRule) -> int:
    """Have another process begin a canary and be killed; return the event that began it."""
    spawn = multiprocessing.get_context("spawn")
    args = (version, world.home, ray.get_runtime_context().gcs_address, rule)
    controller = spawn.Process(target=_promote_elsewhere, args=args, daemon=True)
    controller.start()
    wait_until(lambda: world.registry.state("m").pointer.canary == version)
    controller.kill()
    controller.join()
    return world.registry.state("m").pointer.seq


def _promote_elsewhere(version: int, home: str, address: str, rule: CanaryRule) -> None:
    os.environ["RAY_ADDRESS"] = address
    lepton.promote("m", version, canary=(0.5, 0.6), rule=rule, home=home)


def test_a_trial_that_is_paused_goes_on_when_it_is_promoted_again(world: World) -> None:
    champion = world.registry.state("m").pointer.champion
    other = next(v.version for v in world.versions if v.version != champion)
    told: list[str] = []

    def begin() -> None:
        rule = CanaryRule(bake_s=1000, patience_s=2000)
        lepton.promote("m", other, canary=0.5, rule=rule, home=world.home, on_change=told.append)

    first = threading.Thread(target=begin)
    with Load(world) as load:
        first.start()
        wait_until(lambda: str(other) in load.versions)
        paused = lepton.promotion.pause("m", reason="lunch", home=world.home).pointer
        world.app.wait_for(paused.seq)
        before = len(load.versions)
        load.more(50)
        during = load.versions[before + 1 :]
        assert first.is_alive()  # it waits for what comes after the pause
        lepton.promote("m", other, canary=0.5, bake=1.0, rule=CanaryRule(), home=world.home)
        first.join(120)
        load.more(20)

    assert load.failed == []
    assert set(during) == {str(champion)}
    assert load.versions[-10:] == [str(other)] * 10
    history = [(e.kind, e.reason) for e in world.registry.history("m")[-4:]]
    assert history == [("canary", ""), ("paused", "lunch"), ("canary", ""), ("promoted", "")]
    assert not first.is_alive()
    assert told[0] == f"version {other} at 50%"  # either of the two may have had the last word
    lepton.rollback("m", home=world.home)


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
