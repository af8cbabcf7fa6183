"""Checkpoints are whole or invisible."""

from pathlib import Path

import pytest
import torch

from lepton import checkpoints
from lepton.errors import CheckpointError

CURSOR = {"v": 1, "epoch": 0, "rows": 0, "order": ""}


def states() -> dict[str, object]:
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    opt = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    opt.step()
    return {"net": net.state_dict(), "opt": opt.state_dict()}


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_what_goes_in_comes_out_bit_for_bit(tmp_path: Path) -> None:
    state = states()
    saved = checkpoints.save(tmp_path, step=3, state=state, cursor=CURSOR, metrics={"loss": 1.5})
    loaded = checkpoints.load(saved.uri)

    assert same(checkpoints.restore(loaded), {k: dict(v) for k, v in state.items()})  # type: ignore[call-overload]
    assert loaded == saved
    assert loaded.metrics == {"loss": 1.5}
    assert checkpoints.latest(tmp_path) == saved


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
def test_a_damaged_checkpoint_is_refused_and_passed_over(tmp_path: Path, harm: str) -> None:
    good = checkpoints.save(tmp_path, step=1, state=states(), cursor=CURSOR)
    bad = checkpoints.save(tmp_path, step=2, state=states(), cursor=CURSOR)
    path = bad.path(checkpoints.STATE)
    body = path.read_bytes()
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(body[:-1] if harm == "truncate" else body[:-1] + bytes([body[-1] ^ 1]))

    assert checkpoints.latest(tmp_path) == good
    with pytest.raises(CheckpointError, match=r"state\.safetensors"):
        checkpoints.restore(bad)


def test_without_its_manifest_a_checkpoint_does_not_exist(tmp_path: Path) -> None:
    saved = checkpoints.save(tmp_path, step=1, state=states(), cursor=CURSOR)
    Path(saved.uri).unlink()

    assert checkpoints.latest(tmp_path) is None
    assert checkpoints.prune(tmp_path) == 1
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        checkpoints.load(saved.uri)


def test_a_torn_manifest_is_replaced_and_a_whole_one_stays(tmp_path: Path) -> None:
    first = checkpoints.save(tmp_path, step=1, state=states(), cursor=CURSOR)
    again = checkpoints.save(tmp_path, step=1, state=states(), cursor=CURSOR)
    assert again.folder == first.folder

    Path(first.uri).write_text("{")
    assert checkpoints.latest(tmp_path) is None
    checkpoints.save(tmp_path, step=1, state=states(), cursor=CURSOR)
    assert checkpoints.latest(tmp_path) is not None


def test_state_that_would_need_pickle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="state '/net/thing' is a object"):
        checkpoints.save(tmp_path, step=1, state={"net": {"thing": object()}}, cursor=CURSOR)
