"""Tensors that lie in parts: each rank of a sharded model writes its own, any number reads them.

``shards.json`` says of each such tensor its shape, its data type, and which part of it is in which
file; the files are safetensors, and a reader takes only what overlaps with its own part.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SHARDS = "shards.json"


@dataclass(frozen=True, slots=True)
class Part:
    """A block of a tensor: where it begins, how large it is, and the file that has it."""

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shards:
    """What all ranks have written of a state.

    Attributes:
        folder: the checkpoint's data folder, where their files are.
        files: file name to ``{"sha256", "bytes"}``.
        layout: by a tensor's path in the state: shape, data type and parts.
    """

    folder: str
    files: Mapping[str, Mapping[str, Any]]
    layout: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Laid:
    """A saved tensor that can be read in part.

    Attributes:
        shape: of the whole.
        read: returns the block at an offset, of a shape.
    """

    shape: tuple[int, ...]
    read: Callable[[Sequence[int], Sequence[int]], torch.Tensor]


Fill = Callable[[str, Laid], "torch.Tensor | None"]
"""Makes of a path and what lies there the tensor to load; None: the whole as it is."""


def entry_of(shape: Sequence[int], dtype: Any, parts: Sequence[Part]) -> dict[str, Any]:
    """Return what ``shards.json`` has of a tensor."""
    return {
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "parts": [[p.file, list(p.offset), list(p.shape)] for p in parts],
    }


def lying(path_of: Callable[[str], Path]) -> dict[str, Laid]:
    """Return the tensors that lie in parts, by their paths in the state.

    Args:
        path_of: a checkpoint's file by name.
    """
    layout: dict[str, Any] = json.loads(path_of(SHARDS).read_text())
    return {name: _laid(name, entry, path_of) for name, entry in layout.items()}


def held(tensor: torch.Tensor) -> Laid:
    """Return a tensor in memory as one that can be read in part."""

    def read(offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        return tensor[_block(offset, shape)]

    return Laid(tuple(tensor.shape), read)


def whole(laid: Laid) -> torch.Tensor:
    """Read all of a tensor."""
    return laid.read([0] * len(laid.shape), laid.shape)


def _laid(name: str, entry: Mapping[str, Any], path_of: Callable[[str], Path]) -> Laid:
    parts = [Part(file, tuple(offset), tuple(shape)) for file, offset, shape in entry["parts"]]

    def read(offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        import torch
        from safetensors import safe_open

        opened: Any = safe_open
        found = torch.empty(tuple(shape), dtype=getattr(torch, entry["dtype"]))
        for part in parts:
            common = overlap((tuple(offset), tuple(shape)), (part.offset, part.shape))
            if common is None:
                continue
            begin, size = common
            here = _block([b - o for b, o in zip(begin, offset, strict=True)], size)
            there = _block([b - o for b, o in zip(begin, part.offset, strict=True)], size)
            with opened(path_of(part.file), framework="pt") as f:
                found[here] = f.get_slice(name)[there]
        return found

    return Laid(tuple(entry["shape"]), read)


Block = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a block begins, and its shape."""


def overlap(one: Block, other: Block) -> Block | None:
    """Return the block that two blocks of a tensor have in common, or None."""
    begin = tuple(max(a, b) for a, b in zip(one[0], other[0], strict=True))
    ends = zip(one[0], one[1], other[0], other[1], strict=True)
    end = [min(a + n, b + m) for a, n, b, m in ends]
    size = tuple(e - b for b, e in zip(begin, end, strict=True))
    return None if any(n <= 0 for n in size) else (begin, size)


def _block(offset: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
