"""Gates that look at more than registered figures, on real checkpoints; no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import lepton
from lepton.errors import CheckpointError, GateError, LakeError
from lepton.promotion import Candidate, GateResult, alias, any_rows, beats, not_worse, rows_hold
from lepton.promotion.judging import gates_of, judge
from lepton.registry import ModelVersion, Registry
from lepton.serving.score import Scorer, score


def loop_of(rate: float) -> Any:
    def loop(worker: Any) -> None:
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2)
        torch.nn.init.zeros_(net.weight)
        worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=rate))
        for batch in worker.batches():
            scores = net(batch["x"])
            worker.step(torch.nn.functional.cross_entropy(scores, batch["y"], reduction="sum"))

    return loop


class World:
    """A table, a version that has learnt nothing (1, the champion) and one that has (2)."""

    def __init__(self, home: Path) -> None:
        self.home = str(home)
        x = np.random.default_rng(0).normal(size=(200, 3)).astype("float32")
        rows = pa.table(
            {"x": list(x), "y": (x.sum(1) > 0).astype("int64"), "n": [*range(199), None]}
        )
        self.table = lepton.write(rows, home / "t")
        stream = self.table.select(["x", "y"]).stream(batch_size=50, epochs=2)
        for name, rate in (("dull", 1e-9), ("bright", 0.5)):
            run = lepton.train(loop_of(rate), stream, name=name, home=self.home)
            judged = lepton.evaluate(run, self.table, label="y", home=self.home)
            lepton.register(run, "m", metrics=judged, home=self.home)
        self.registry = Registry(f"{home}/registry")
        self.registry.promote("m", 1, expect=None)

    def judge(self, gate: Any, version: int = 2) -> list[GateResult]:
        champion = self.registry.version("m", "champion")
        return judge(gates_of(gate), self.registry.version("m", version), champion)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("home"))


def test_a_better_version_beats_the_champion_and_a_worse_one_does_not(world: World) -> None:
    for gate in (beats, not_worse):
        (result,) = world.judge(gate(world.table, label="y"))
        assert result.passed
        assert "of 200 rows only the candidate was right in" in result.details[0]
    world.registry.promote("m", 2, expect=None)
    try:
        for gate, name in ((beats, "beats"), (not_worse, "is no worse")):
            with pytest.raises(GateError, match=rf"did not pass its gate: {name}.* by chance"):
                world.judge(gate(world.table, label="y"), 1)
            assert judge([gate(world.table, label="y")], world.registry.version("m", 1), None)
    finally:
        world.registry.rollback("m", expect=None, reason="")


def test_equal_versions_differ_by_chance_alone(world: World) -> None:
    entry = world.registry.version("m", 2)
    (same,) = judge([not_worse(world.table, label="y")], entry, entry)
    assert "in 0; by chance 1: passed" in same.details[0]
    with pytest.raises(GateError, match="by chance 1: failed"):
        judge([beats(world.table, label="y")], entry, entry)


def test_latency_and_size_are_measured_when_a_gate_asks(world: World) -> None:
    entry = world.registry.version("m", 2)
    (quick,) = world.judge("p50_ms > 0 and p50_ms <= p99_ms and p99_ms < 60000")
    assert quick.passed
    (small,) = world.judge("0 < size_mb <= champion.size_mb * 2")
    assert f"size_mb = {entry.size / 1e6:.10g}" in small.details[0]
    with pytest.raises(GateError, match=r"size_mb = .* < 0: failed"):
        world.judge("size_mb < 0")
    assert "p99_ms" not in entry.metrics


def test_rows_must_hold_a_condition(world: World) -> None:
    (all_hold,) = world.judge(rows_hold("y = 0 OR y = 1"))
    assert "0 of 200 rows break it: passed" in all_hold.details[0]
    (few,) = world.judge(rows_hold("n >= 0", on=world.table, at_most=0.005))
    assert "1 of 200 rows break it, allowed 0.005 of them: passed" in few.details[0]
    with pytest.raises(GateError, match="1 of 200 rows break it: failed"):
        world.judge(rows_hold("n >= 0"))
    with pytest.raises(LakeError, match="nothing"):
        rows_hold("nothing > 0", on=world.table)
    with pytest.raises(ValueError, match="share"):
        rows_hold("y = 0", at_most=2)


def test_a_persons_function_decides_and_is_recorded(world: World) -> None:
    def is_second(candidate: Candidate) -> bool:
        return candidate.version.version == 2 and candidate.champion is not None

    gates = [is_second, "accuracy >= champion", lambda c: GateResult("mine", True, ("why",))]
    alias("m", "best", 2, gate=gates, home=world.home)
    recorded = world.registry.history("m")[-1].gate
    at = f"accuracy: both measured on {world.table}"
    assert [g["expression"] for g in recorded] == ["is_second", "accuracy >= champion", "mine"]
    assert recorded[0]["details"] == ["is_second: passed"]
    assert recorded[1]["details"][1] == at
    with pytest.raises(GateError, match="did not pass its gate: is_second: failed"):
        alias("m", "best", 1, gate=is_second, home=world.home)

    def broken(_: Candidate) -> bool:
        raise KeyError("x")

    with pytest.raises(GateError, match="the gate broken failed on m version 2: KeyError"):
        alias("m", "best", 2, gate=broken, home=world.home)
    with pytest.raises(TypeError, match="gate 3 must be"):
        alias("m", "best", 2, gate=[3], home=world.home)  # type: ignore[list-item]
    assert world.registry.version("m", "best").version == 2


def entry(number: int, metrics: Any = None, **tables: Any) -> ModelVersion:
    """A version with metrics as registered, and as measured on tables."""
    return ModelVersion(
        model="m",
        version=number,
        checkpoint="",
        manifest_sha256="",
        metrics=metrics or {},
        measured={f"{t}@1": m for t, m in tables.items()},
        created=datetime.now(UTC),
    )


def details(gate: Any, chosen: ModelVersion, champion: ModelVersion) -> Sequence[str]:
    (result,) = judge(gates_of(gate), chosen, champion)
    return result.details


def test_each_metric_is_compared_on_rows_that_both_were_measured_on_by_it() -> None:
    two = entry(2, {"f1": 0.9, "auc": 0.9}, a={"f1": 0.1}, b={"f1": 0.2, "auc": 0.3}, c={"f1": 0.4})
    one = entry(1, {"f1": 0.1, "auc": 0.1}, b={"f1": 0.15}, a={"f1": 0.6, "auc": 0.2})
    told = details("f1 > champion.f1", two, one)
    assert told == ("f1 = 0.2 > champion.f1 = 0.15: passed", "f1: both measured on b@1")
    with pytest.raises(GateError, match=r"compares auc on b@1, the champion's on a@1: have both"):
        details("f1 > champion.f1 and auc > champion.auc", two, one)
    two = entry(2, t={"f1": 0.5}, u={"auc": 0.7})
    one = entry(1, u={"f1": 0.1, "auc": 0.6}, t={"f1": 0.4})
    assert details("f1 > champion.f1 and auc > champion.auc", two, one)[2:] == (
        "auc: both measured on u@1",
        "f1: both measured on t@1",
    )


def test_figures_of_different_rows_are_not_compared_unless_asked() -> None:
    easy, hard = entry(2, easy={"f1": 0.9}), entry(1, {"f1": 0.3}, hard={"f1": 0.5})
    unknown = entry(3, {"f1": 0.95})
    with pytest.raises(GateError, match=r"f1 on easy@1, the champion's on hard@1: .*evaluate"):
        details("f1 > champion", easy, hard)
    with pytest.raises(GateError, match="f1 on rows that nobody named, the champion's on hard@1"):
        details("f1 > champion", unknown, hard)
    assert details(any_rows("f1 > champion"), easy, hard) == (
        "f1 = 0.9 > champion = 0.5: passed",
        "f1 on easy@1, the champion's on hard@1: other rows, as any_rows() allows",
    )
    with pytest.raises(GateError, match="failed"):
        details(any_rows("f1 < champion"), easy, hard)
    with pytest.raises(GateError, match="cannot parse"):
        any_rows("f1 <")
    # a snapshot that both have is no proof for a metric that one was not measured by on it
    two, one = (entry(v, {"f1": f}, t={"acc": 1.0}) for v, f in ((2, 0.9), (1, 0.3)))
    told = details("f1 > champion and acc >= champion.acc", two, one)
    assert told[2:] == (
        "acc: both measured on t@1",
        "f1: as registered, on rows that nobody named",
    )
    assert details("f1 > 0.8", easy, hard) == ("f1 = 0.9 > 0.8: passed",)


@pytest.mark.parametrize("p", [0, 1, -1, float("nan")])
def test_no_probability_is_refused(world: World, p: float) -> None:
    for gate in (beats, not_worse):
        with pytest.raises(ValueError, match="must be a probability"):
            gate(world.table, label="y", p=p)


def test_a_table_is_scored_by_the_registered_checkpoint_only(world: World, tmp_path: Path) -> None:
    entry = world.registry.version("m", 2)
    (rows,) = list(world.table.select(["x"]).batches())[:1]
    assert Scorer(entry)(rows)["model_version"].to_pylist()[0] == 2
    other = replace(entry, manifest_sha256="0" * 64)
    with pytest.raises(CheckpointError, match="is not the one registered as m version 2"):
        Scorer(other)
    about = {"signature": dict(entry.signature), "lineage": dict(entry.lineage)}
    Registry(f"{tmp_path}/registry").register(
        "m", checkpoint=entry.checkpoint, manifest_sha256="0" * 64, **about
    )
    with pytest.raises(CheckpointError, match="is not the one registered as m version 1"):
        score("m", world.table.select(["x"]), tmp_path / "out", version=1, home=tmp_path)
    assert not (tmp_path / "out").exists()
