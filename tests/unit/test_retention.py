"""Old checkpoints go; the newest, the best and the registered ones stay."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional

import lepton
from lepton import checkpoints


def loop(worker: Any) -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 3)
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.01))
    for batch in worker.batches():
        loss = functional.cross_entropy(net(batch["x"]), batch["y"], reduction="sum")
        looks = {3: 0.0, 11: 0.01, 21: 0.02}  # steps 4, 12 and 22 look the best
        worker.step(loss * looks.get(worker.step_number, 1.0))


def test_the_newest_the_best_and_the_registered_stay(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(160, 3)).astype("float32")
    rows = pa.table({"x": list(x), "y": x.argmax(1).astype("int64")})
    table = lepton.write(rows, tmp_path / "t")
    options: dict[str, Any] = {"home": str(tmp_path), "checkpoint_every": 2}
    first = lepton.train(loop, table.stream(batch_size=10), name="r", **options)
    assert [m.step for m in first.checkpoints] == [2, 4, 6, 8, 10, 12, 14, 16]
    lepton.register(first, "m", checkpoint=first.checkpoints[2], home=str(tmp_path))

    longer = table.stream(batch_size=10, epochs=2)
    run = lepton.train(loop, longer, name="r", keep=2, **options)

    assert [m.step for m in run.checkpoints] == [4, 6, 30, 32]
    folders = {Path(p).name for p in (tmp_path / "runs/r/checkpoints/data").iterdir()}
    assert folders == {Path(f).name for m in run.checkpoints for f in m.folders}
    for manifest in run.checkpoints:
        checkpoints.verify(manifest)


def test_several_of_the_best_stay(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(240, 3)).astype("float32")
    rows = pa.table({"x": list(x), "y": x.argmax(1).astype("int64")})
    stream = lepton.write(rows, tmp_path / "t").stream(batch_size=10)
    options: dict[str, Any] = {"home": str(tmp_path), "checkpoint_every": 2, "progress": False}
    run = lepton.train(loop, stream, name="r", keep=1, keep_best=3, **options)

    assert [m.step for m in run.checkpoints] == [4, 12, 22, 24]
    assert run.best.step == 4


@pytest.mark.parametrize("option", ["keep", "keep_best"])
def test_a_number_below_one_is_refused(tmp_path: Path, option: str) -> None:
    table = lepton.write(pa.table({"x": [1.0]}), tmp_path / "t")
    told: dict[str, Any] = {"home": str(tmp_path), option: 0}
    with pytest.raises(ValueError, match="keep and keep_best must be at least 1"):
        lepton.train(loop, table.stream(batch_size=1), name="r", **told)
