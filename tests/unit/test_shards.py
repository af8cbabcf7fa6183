"""Tensors in parts: however they were cut, any block of them is read as it was."""

import tempfile
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton import checkpoints
from lepton.checkpoints.shards import Part, Shards, entry_of, overlap
from lepton.errors import CheckpointError

CURSOR = {"v": 1, "epoch": 0, "rows": 0, "order": ""}


def cut(size: int, parts: int) -> list[tuple[int, int]]:
    """(begin, length) of the parts that torch's chunks have; the last ones may be empty."""
    each = -(-size // parts)
    edges = [min(size, each * i) for i in range(parts + 1)]
    return [(a, b - a) for a, b in pairwise(edges)]


def write(root: Path | str, whole: torch.Tensor, grid: Sequence[int]) -> checkpoints.Manifest:
    """Write a checkpoint as ranks that lie in a grid over the tensor would."""
    folder, files, parts = "data/step-00000003-g000000", {}, []
    blocks = product(*(cut(n, k) for n, k in zip(whole.shape, grid, strict=True)))
    for rank, block in enumerate(blocks):
        offset, shape = tuple(b for b, _ in block), tuple(n for _, n in block)
        if 0 in shape:
            continue
        name = f"shard-{rank:04d}.safetensors"
        local = whole[tuple(slice(b, b + n) for b, n in block)].contiguous()
        files[name] = checkpoints.write_shard(root, folder, name, {"/net/w": local})
        parts.append(Part(name, offset, shape))
    layout = {"/net/w": entry_of(whole.shape, whole.dtype, parts)}
    shards = Shards(folder=folder, files=files, layout=layout)
    flat = (
        {"/net/b": torch.ones(2)},
        {"$dict": [["net", {"$dict": [["w", {"$tensor": "/net/w"}]]}]]},
    )
    return checkpoints.write(root, flat, step=3, cursor=CURSOR, shards=shards)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_block_is_read_whatever_ranks_wrote_it(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    grid = [data.draw(st.integers(1, 4)) for _ in shape]
    whole = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    with tempfile.TemporaryDirectory() as root:
        manifest = write(Path(root), whole, grid)
        assert torch.equal(checkpoints.restore(manifest)["net"]["w"], whole)
        for ranks in range(1, 6):
            found = []
            for begin, length in cut(shape[0], ranks):

                def fill(path: str, laid: Any, begin: int = begin, length: int = length) -> Any:
                    if path != "/net/w":
                        return None
                    return laid.read([begin, *(0 for _ in shape[1:])], [length, *shape[1:]])

                found.append(checkpoints.restore(manifest, fill)["net"]["w"])
            assert torch.equal(torch.cat(found), whole), ranks


BLOCKS = st.tuples(st.integers(0, 6), st.integers(0, 6))


@given(BLOCKS, BLOCKS)
def test_two_blocks_have_in_common_what_is_in_both(
    one: tuple[int, int], other: tuple[int, int]
) -> None:
    common = overlap(((one[0],), (one[1],)), ((other[0],), (other[1],)))
    both = set(range(one[0], sum(one))) & set(range(other[0], sum(other)))

    assert both == (set(range(common[0][0], common[0][0] + common[1][0])) if common else set())


def test_without_one_of_its_parts_a_checkpoint_is_not_whole(tmp_path: Path) -> None:
    manifest = write(tmp_path, torch.ones(6, 2), (3, 1))
    assert checkpoints.latest(tmp_path) == manifest
    manifest.path("shard-0001.safetensors").unlink()

    assert checkpoints.latest(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"shard-0001\.safetensors is missing"):
        checkpoints.restore(manifest)
