"""Ray Tune over lepton's runs: trials killed, a search taken up again, the best registered."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional

import lepton
from lepton import Validation
from lepton.errors import TrainingError
from lepton.telemetry import spans_of

pytestmark = pytest.mark.usefixtures("ray_cluster")


def loop(worker: Any, config: Mapping[str, Any]) -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 3)
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=config["rate"]))
    for batch in worker.batches():
        killed = Path(config["killed"])
        if config["rate"] == 0.5 and worker.step_number == 5 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if config["rate"] < 0:
            raise ArithmeticError("uphill")
        worker.step(functional.cross_entropy(net(batch["x"]), batch["y"], reduction="sum"))


def test_a_search_survives_a_kill_and_finds_the_best(tmp_path: Path) -> None:
    from ray import tune

    x = np.random.default_rng(0).normal(size=(300, 3)).astype("float32")
    rows = pa.table({"x": list(x), "y": x.argmax(1).astype("int64")})
    table = lepton.write(rows, tmp_path / "t")
    options: dict[str, Any] = {
        "name": "search",
        "space": {
            "rate": tune.grid_search([1e-6, 0.5, -1.0]),
            "killed": str(tmp_path / "killed"),
        },
        "validate": Validation(table, label="y", every=4),
        "metric": "accuracy",
        "retries": 1,
        "checkpoint_every": 2,
        "home": str(tmp_path / "home"),
    }
    stream = table.stream(batch_size=50, epochs=2, lanes=1)
    found = lepton.tune(loop, stream, **options)

    assert [t.config["rate"] for t in found.trials] == [0.5, 1e-6]  # the third was never judged
    best = found.best
    assert best.judged.metrics["accuracy"] > 0.8
    assert best.run.best.metrics["accuracy"] == best.judged.metrics["accuracy"]
    assert (tmp_path / "killed").exists()
    assert best.run.attempts[1][0].step in (2, 4)  # it went on, from a checkpoint
    assert best.run.steps == stream.steps
    assert found.table["config.rate"].to_pylist() == [0.5, 1e-6]
    assert {t.run.trace_id for t in found.trials} == {found.trace_id}
    spans = spans_of(f"{tmp_path}/home/traces")
    (root,) = [s for s in spans if s.name == "lepton.tune"]
    assert {s.parent_id for s in spans if s.name == "lepton.train"} == {root.span_id}
    model = lepton.register(best.run, "m", checkpoint=best.run.best, home=str(tmp_path / "home"))
    assert model.lineage["run"] == best.run.name

    again = lepton.tune(loop, stream, **options)
    assert again.trials[0].run == best.run
    assert again.trace_id == found.trace_id
    with pytest.raises(TrainingError, match="was begun with metric='accuracy'"):
        lepton.tune(loop, stream, **{**options, "metric": "f1"})
    with pytest.raises(ValueError, match="has the figures"):
        lepton.tune(loop, stream, **{**options, "metric": "mse", "name": "other"})


def test_a_trial_of_several_workers_finds_room_for_them(tmp_path: Path) -> None:
    from ray import tune

    x = np.random.default_rng(0).normal(size=(300, 3)).astype("float32")
    rows = pa.table({"x": list(x), "y": x.argmax(1).astype("int64")})
    table = lepton.write(rows, tmp_path / "t")
    found = lepton.tune(
        loop,
        lambda config: table.stream(batch_size=config["batch"], epochs=3, lanes=2),
        name="wide",
        space={
            "rate": 0.3,
            "batch": tune.choice([20]),
            "killed": str(tmp_path / "killed"),
        },
        validate=Validation(table, label="y", every=5),
        metric="accuracy",
        scheduler=tune.schedulers.ASHAScheduler(grace_period=1, reduction_factor=2, max_t=99),
        workers=2,
        retries=0,
        home=str(tmp_path / "home"),
    )

    assert found.best.config["batch"] == 20
    assert [a.world_size for a, _ in found.best.run.attempts] == [2]
    assert found.best.run.steps == 45
    assert not found.best.error
