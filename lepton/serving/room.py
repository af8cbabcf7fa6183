"""Whether a version fits into memory beside those that are there.

Asked before anything is loaded: a machine that runs out of memory kills the replica, and with it
the version that answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from lepton.checkpoints import PROGRAM, Manifest
from lepton.checkpoints.reading import BASE, STATE
from lepton.checkpoints.shards import SHARDS
from lepton.errors import LeptonError
from lepton.export.program import is_loaded

MARGIN = 1.1
"""What a version takes, over what its weights do."""
_CGROUP = Path("/sys/fs/cgroup")


class NoRoom(LeptonError):  # noqa: N818 - no fault of the version's
    """A version does not fit beside those in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """The memory for versions of a model, in one replica.

    Attributes:
        device: where nets compute, as torch names it.
        most: bytes that the weights of all versions may take; None for as many as are free.
    """

    device: str = "cpu"
    most: int | None = None

    def lacking(self, held: int, manifest: Manifest) -> int:
        """Return how many bytes are missing for another version; 0 if it fits.

        Args:
            held: bytes of the weights in memory.
            manifest: of the version's checkpoint.
        """
        weights = weights_of(manifest)
        if self.most is not None:
            return max(0, held + weights - self.most)
        free = free_bytes(self.device)
        if free is None:
            return 0
        needed = weights * MARGIN
        if PROGRAM in manifest.files and not is_loaded(manifest.path(PROGRAM), self.device):
            needed += weights  # which are read with the graph, and then replaced
        return max(0, int(needed) - free)

    def emptied(self) -> None:
        """Give back to the device what versions that were let go of had."""
        if self.device.startswith("cuda"):
            _emptied(self.device)


def _emptied(device: str) -> None:
    import torch

    with torch.cuda.device(device):
        torch.cuda.empty_cache()


def weights_of(manifest: Manifest) -> int:
    """Return the bytes of a checkpoint's weights, without what only training needs.

    What cannot be read counts as nothing: loading it says what is wrong.
    """
    net = (manifest.signature or {}).get("net", "")
    try:
        return sum(size for path, size in _tensors(manifest) if path.startswith(f"/{net}/"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0


def _tensors(manifest: Manifest) -> Iterator[tuple[str, int]]:
    """The tensors of a checkpoint by their paths, and their bytes; only headers are read."""
    for name in (BASE, STATE):
        if name in manifest.files:
            with manifest.path(name).open("rb") as file:
                header: dict[str, Any] = json.loads(
                    file.read(int.from_bytes(file.read(8), "little"))
                )
            for path, about in header.items():
                if path != "__metadata__":
                    begin, end = about["data_offsets"]
                    yield path, end - begin
    if SHARDS in manifest.files:
        layout: dict[str, Any] = json.loads(manifest.path(SHARDS).read_text())
        for path, about in layout.items():
            yield path, prod(about["shape"]) * _bytes_of(about["dtype"])


def _bytes_of(dtype: str) -> int:
    import torch

    return getattr(torch, dtype).itemsize


def free_bytes(device: str) -> int | None:
    """Return the bytes that are free where a net computes; None where nobody can say."""
    if device.startswith("cuda"):
        import torch

        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if not device.startswith("cpu"):
        return None
    told = [_available(), _of_cgroup()]
    known = [found for found in told if found is not None]
    return min(known) if known else None


def _available() -> int | None:
    """Of the machine, with what its file cache would give back."""
    try:
        return _numbers(Path("/proc/meminfo"))["MemAvailable:"] * 1024
    except (OSError, KeyError, ValueError):
        return None


def _of_cgroup(root: Path = _CGROUP, own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Of the group that this process is in, and of those around it; None where none is limited."""
    try:
        lines = own.read_text().splitlines()
        named = next(line.removeprefix("0::/") for line in lines if line.startswith("0::/"))
    except (OSError, StopIteration):
        return None
    folder = root / named
    found = [_of_group(at) for at in (folder, *folder.parents) if at.is_relative_to(root)]
    limited = [free for free in found if free is not None]
    return min(limited) if limited else None


def _of_group(folder: Path) -> int | None:
    try:
        most = int((folder / "memory.max").read_text())  # "max" where there is no limit
        used = int((folder / "memory.current").read_text())
        cached = _numbers(folder / "memory.stat")["inactive_file"]
    except (OSError, KeyError, ValueError):
        return None
    return max(0, most - used + cached)


def _numbers(path: Path) -> Mapping[str, int]:
    """The numbers of a file with a name and a number in each line."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}
