"""The exported program lies beside a run's checkpoints once; each has its hash."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional

import lepton
from lepton import checkpoints
from lepton.errors import CheckpointError
from lepton.export.restore import Predictor
from lepton.lake import Snapshot

WIDE, STEPS = 128, 10


def make_loop(between: type[torch.nn.Module] = torch.nn.ReLU, fail_at: int = -1) -> Any:
    def loop(worker: Any) -> None:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, WIDE), between(), torch.nn.Linear(WIDE, 3))
        worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
        for batch in worker.batches():
            if worker.step_number == fail_at:
                raise RuntimeError("the power went out")
            worker.step(functional.cross_entropy(net(batch["x"]), batch["y"], reduction="sum"))

    return loop


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    x = np.random.default_rng(0).normal(size=(STEPS * 10, 3)).astype("float32")
    rows = pa.table({"x": list(x), "y": x.argmax(1).astype("int64")})
    return lepton.write(rows, tmp_path_factory.mktemp("lake") / "t")


def train(table: Snapshot, home: Path, loop: Any, **options: Any) -> lepton.Run:
    told: dict[str, Any] = {"checkpoint_every": 2, "progress": False, **options}
    return lepton.train(loop, table.stream(batch_size=10), name="r", home=str(home), **told)


def programs(run: lepton.Run) -> list[str]:
    return [c.place(checkpoints.PROGRAM) for c in run.checkpoints]


def test_it_is_written_once_in_all_lives_of_a_run(table: Snapshot, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="power"):
        train(table, tmp_path, make_loop(fail_at=5))
    run = train(table, tmp_path, make_loop(), keep=2)

    assert len(set(programs(run))) == 1
    assert len(list(Path(run.folder).glob("checkpoints/data/*/program.pt2"))) == 1
    weights = run.checkpoint.files[checkpoints.STATE]["bytes"]
    assert run.checkpoint.own_size < 2 * weights
    assert checkpoints.prune(run.where) == 0
    version = lepton.register(run, "m", home=str(tmp_path))
    rows = table.to_arrow()
    net = checkpoints.restore(run.checkpoint)["net"]
    x = torch.from_numpy(np.stack(rows["x"].to_numpy()))
    hidden = functional.relu(functional.linear(x, net["0.weight"], net["0.bias"]))
    expected = functional.linear(hidden, net["2.weight"], net["2.bias"])
    answers = Predictor(checkpoints.load(version.checkpoint))(rows)["output"]
    assert torch.allclose(answers, expected, atol=1e-5)


def test_a_net_that_computes_otherwise_has_another_one(table: Snapshot, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="power"):
        train(table, tmp_path, make_loop(fail_at=5))
    before = train(table, tmp_path, make_loop(torch.nn.Tanh))

    first, last = programs(before)[0], programs(before)[-1]
    assert first != last
    rows = table.to_arrow().slice(0, 5)
    weights = checkpoints.restore(before.checkpoint)["net"]
    x = torch.from_numpy(np.stack(rows["x"].to_numpy()))
    hidden = torch.tanh(functional.linear(x, weights["0.weight"], weights["0.bias"]))
    expected = functional.linear(hidden, weights["2.weight"], weights["2.bias"])
    assert torch.allclose(Predictor(before.checkpoint)(rows)["output"], expected, atol=1e-5)


@pytest.mark.parametrize("harm", ["remove", "flip"])
def test_without_a_whole_one_a_run_goes_on_and_writes_another(
    table: Snapshot, tmp_path: Path, harm: str
) -> None:
    with pytest.raises(RuntimeError, match="power"):
        train(table, tmp_path, make_loop(fail_at=5))
    (program,) = (tmp_path / "runs/r/checkpoints/data").glob("*/program.pt2")
    if harm == "remove":
        program.unlink()
    else:
        body = program.read_bytes()
        program.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    run = train(table, tmp_path, make_loop())

    assert run.attempts[-1][0].step == 4, "no step was made again"
    assert run.steps == STEPS
    with pytest.raises(CheckpointError, match=r"program\.pt2"):
        Predictor(run.checkpoints[0])
    Predictor(run.checkpoint)
