"""Checkpoints of what is trained alone, with what is frozen beside them, once."""

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
from lepton.training.frozen import identity_of

WIDE = 256


class Adapted(torch.nn.Module):
    """A frozen body, used twice, with a low-rank adapter and a head that are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(WIDE, WIDE)
        self.again = self.body
        self.down = torch.nn.Linear(WIDE, 2, bias=False)
        self.up = torch.nn.Linear(2, WIDE, bias=False)
        self.head = torch.nn.Sequential(torch.nn.BatchNorm1d(WIDE), torch.nn.Linear(WIDE, 3))
        self.body.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.body(x) + self.up(self.down(x))
        return self.head(self.again(torch.tanh(hidden)))


def make_loop(*, fail_at: int = -1, thaw_at: int = -1) -> Any:
    def loop(worker: Any) -> None:
        torch.manual_seed(0)
        net = Adapted()
        worker.attach(net=net, opt=torch.optim.Adam(net.parameters(), lr=0.02))
        for batch in worker.batches():
            if worker.step_number == fail_at:
                raise RuntimeError("the power went out")
            net.body.bias.requires_grad_(worker.step_number >= thaw_at >= 0)
            worker.step(functional.cross_entropy(net(batch["x"]), batch["y"], reduction="sum"))

    return loop


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    x = np.random.default_rng(0).normal(size=(200, WIDE)).astype("float32")
    rows = pa.table({"x": list(x), "y": x[:, :3].argmax(1).astype("int64")})
    return lepton.write(rows, tmp_path_factory.mktemp("lake") / "t")


def same(one: lepton.Run, other: lepton.Run) -> bool:
    a, b = (checkpoints.restore(r.checkpoint)["net"] for r in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_small_checkpoints_resume_register_and_answer(table: Snapshot, tmp_path: Path) -> None:
    stream = table.stream(batch_size=20, epochs=1, lanes=1)
    options: dict[str, Any] = {"home": str(tmp_path), "checkpoint_every": 3, "progress": False}
    whole = lepton.train(make_loop(), stream, name="whole", **options)
    options["trainable_only"] = True
    with pytest.raises(RuntimeError, match="power"):
        lepton.train(make_loop(fail_at=7), stream, name="small", **options)
    small = lepton.train(make_loop(), stream, name="small", **options)

    assert small.losses == whole.losses
    assert same(small, whole)
    sizes = [(c.own_size, c.size) for c in small.checkpoints]
    assert all(2 * own < entire for own, entire in sizes), sizes
    assert len({c.files[checkpoints.BASE]["in"] for c in small.checkpoints}) == 1
    assert checkpoints.prune(f"{small.folder}/checkpoints") == 0

    version = lepton.register(small, "adapted", home=str(tmp_path))
    rows = table.to_arrow().slice(0, 4)
    answers = Predictor(checkpoints.load(version.checkpoint))(rows)["output"]
    expected = Predictor(whole.checkpoint)(rows)["output"]
    assert torch.equal(answers, expected)


def test_a_damaged_or_missing_base_is_refused(table: Snapshot, tmp_path: Path) -> None:
    stream = table.stream(batch_size=50, lanes=1)
    told: dict[str, Any] = {"home": str(tmp_path), "progress": False, "trainable_only": True}
    run = lepton.train(make_loop(), stream, name="r", **told)
    base = run.checkpoint.path(checkpoints.BASE)
    body = base.read_bytes()
    base.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))

    manifest = checkpoints.all_of(f"{run.folder}/checkpoints")[-1]
    with pytest.raises(CheckpointError, match=r"base\.safetensors does not match its hash"):
        checkpoints.restore(manifest)
    base.unlink()
    with pytest.raises(CheckpointError, match=r"base\.safetensors is missing"):
        checkpoints.restore(manifest)


def test_what_is_unfrozen_later_is_kept_from_then_on(table: Snapshot, tmp_path: Path) -> None:
    stream = table.stream(batch_size=50, epochs=2, lanes=1)
    told: dict[str, Any] = {"home": str(tmp_path), "progress": False, "checkpoint_every": 2}
    whole = lepton.train(make_loop(thaw_at=4), stream, name="whole", **told)
    small = lepton.train(make_loop(thaw_at=4), stream, name="small", trainable_only=True, **told)

    first, last = (checkpoints.restore(c)["net"] for c in (small.checkpoints[0], small.checkpoint))
    assert not torch.equal(first["body.bias"], last["body.bias"])
    assert torch.equal(first["body.weight"], last["body.weight"])
    assert same(small, whole)


def test_the_identity_is_of_names_shapes_and_bytes() -> None:
    one = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(0, dtype=torch.bfloat16)}

    assert identity_of(one) == identity_of(dict(reversed(one.items())))
    assert identity_of(one) != identity_of({**one, "a": one["a"].reshape(3, 2)})
    assert identity_of(one) != identity_of({**one, "a": one["a"] + 1})
