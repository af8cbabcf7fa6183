"""Runs whose checkpoints are on S3: a machine that has nothing else goes on from them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional

import lepton
from lepton import checkpoints
from lepton.errors import TrainingError
from lepton.training import portions
from tests.unit.test_checkpoints_portions import DESCRIBED, WHOLE, plan, portion

pytest.importorskip("obstore")

__all__ = ["plan"]  # a fixture


def make_loop(fail_at: int = -1) -> Any:
    def loop(worker: Any) -> None:
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 3)
        worker.attach(net=net, opt=torch.optim.Adam(net.parameters(), lr=0.01))
        for batch in worker.batches():
            if worker.step_number == fail_at:
                raise RuntimeError("the power went out")
            worker.step(functional.cross_entropy(net(batch["x"]), batch["y"], reduction="sum"))

    return loop


def test_a_run_goes_on_where_nothing_but_its_checkpoints_is_left(
    options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    x = np.random.default_rng(0).normal(size=(200, 3)).astype("float32")
    rows = pa.table({"x": list(x), "y": x.argmax(1).astype("int64")})
    stream = lepton.write(rows, tmp_path / "t").stream(batch_size=10, lanes=1)
    told: dict[str, Any] = {"checkpoint_every": 4, "progress": False, "storage_options": options}
    whole = lepton.train(make_loop(), stream, name="whole", home=str(tmp_path / "a"), **told)
    told["checkpoints"] = "s3://lake/elsewhere/runs"
    with pytest.raises(RuntimeError, match="power"):
        lepton.train(make_loop(10), stream, name="r", home=str(tmp_path / "a"), **told)
    run = lepton.train(make_loop(), stream, name="r", home=str(tmp_path / "b"), **told)

    assert [a.step for a, _ in run.attempts] == [8]
    assert run.steps == whole.steps == 20
    assert len({c.place(checkpoints.PROGRAM) for c in run.checkpoints}) == 1
    assert run.losses == whole.losses[8:]
    weights = checkpoints.restore(run.checkpoint)["net"]
    for name, value in checkpoints.restore(whole.checkpoint)["net"].items():
        assert torch.equal(weights[name], value)
    other = stream.snapshot.stream(batch_size=10, lanes=1, seed=7)
    with pytest.raises(TrainingError, match="of another order than"):
        lepton.train(make_loop(), other, name="r", home=str(tmp_path / "c"), **told)


def test_portions_of_a_sharded_state_are_committed_there(
    options: dict[str, str], plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    there = replace(plan, checkpoints="s3://lake/elsewhere/portions", options=options)
    first, second = portion(0, slice(0, 3)), portion(1, slice(3, 4))
    portions.write(there, first)
    assert portions.commit(there, first, DESCRIBED, lambda: True) is None
    assert checkpoints.all_of(there.kept_in, options) == []

    for one in (second, first):
        portions.write(there, one)
    made = portions.commit(there, first, DESCRIBED, lambda: False)
    assert made is not None
    assert torch.equal(checkpoints.restore(made)["net"]["w"], WHOLE)
