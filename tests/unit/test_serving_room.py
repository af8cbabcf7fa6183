"""Whether a version fits into memory, by what lies on disk and what the machine has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lepton import checkpoints
from lepton.checkpoints import Manifest
from lepton.checkpoints.shards import Shards, entry_of
from lepton.serving import Service
from lepton.serving.room import Room, _of_cgroup, free_bytes, weights_of


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """A net of 40 bytes; what its optimizer keeps is larger."""
    tensors = {"/net/weight": torch.zeros(10), "/opt/state/0": torch.zeros(1000)}
    return checkpoints.write(
        tmp_path / "run",
        (tensors, {}),
        step=1,
        cursor={},
        signature={"net": "net", "inputs": [], "outputs": []},
    )


def test_only_weights_count(manifest: Manifest) -> None:
    assert weights_of(manifest) == 40


def test_what_cannot_be_read_counts_as_nothing(manifest: Manifest) -> None:
    path = manifest.path(checkpoints.STATE)
    whole = path.read_bytes()
    for damaged in (b"", whole[:4], whole[:30], b"\0" * 100):
        path.write_bytes(damaged)
        assert weights_of(manifest) == 0
    path.unlink()
    assert weights_of(manifest) == 0


def test_what_is_lacking(manifest: Manifest) -> None:
    assert Room(most=100).lacking(60, manifest) == 0
    assert Room(most=100).lacking(61, manifest) == 1
    assert Room().lacking(10**18, manifest) == 0  # 40 bytes are free, whatever is there already
    assert (free_bytes("cpu") or 0) > 2**20
    assert free_bytes("meta") is None
    assert Room(device="meta").lacking(10**18, manifest) == 0


def test_the_limit_that_is_nearest_counts(tmp_path: Path, manifest: Manifest) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    inner = root / "outer" / "inner"
    inner.mkdir(parents=True)
    own.write_text("0::/outer/inner\n")
    assert _of_cgroup(root, own) is None
    for folder, most in ((inner, "max"), (inner.parent, "1000")):
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text("700\n")
        (folder / "memory.stat").write_text("anon 600\ninactive_file 50\n")
    assert _of_cgroup(root, own) == 350
    (inner / "memory.max").write_text("701\n")
    assert _of_cgroup(root, own) == 51
    own.write_text("4:memory:/outer\n")
    assert _of_cgroup(root, own) is None


def test_a_budget_is_at_least_a_byte() -> None:
    with pytest.raises(ValueError, match="weights_bytes=0 must be at least 1"):
        Service(weights_bytes=0)


def test_sharded_weights_count_whole(tmp_path: Path) -> None:
    layout = {
        "/net/weight": entry_of((6, 2), torch.float16, []),
        "/opt/state/0": entry_of((100,), torch.float32, []),
    }
    manifest = checkpoints.write(
        tmp_path / "run",
        ({"/net/bias": torch.zeros(2)}, {}),
        step=1,
        cursor={},
        shards=Shards(folder="data/x", files={}, layout=layout),
        signature={"net": "net", "inputs": [], "outputs": []},
    )
    assert weights_of(manifest) == 24 + 8
