"""Sums that do not depend on how many workers made them: bitwise-equal weights at any world size.

Floating-point sums depend on their order. Here each lane's gradient is made by itself, from rows
that are always the same, and the lanes are added one after another, lane 0 first, on every rank.
That costs one broadcast a lane instead of one all-reduce, and smaller pieces to compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from lepton.errors import TrainingError
from lepton.training.gradients import Gradients, Summed
from lepton.training.group import Group

if TYPE_CHECKING:
    from lepton.stream import Part

Closure = Callable[[Mapping[str, Any]], torch.Tensor]
"""Returns the summed loss of the rows of a batch."""


class LaneSums:
    """Adds gradients up lane by lane.

    Args:
        gradients: of all trained parameters.
        lanes: how many the stream has.
        seed: of the run, for the random numbers of each lane's rows (dropout).
    """

    def __init__(self, gradients: Gradients, lanes: int, seed: int) -> None:
        self._gradients = gradients
        self._lanes = lanes
        self._seed = seed
        self._kept: dict[int, list[torch.Tensor]] = {}

    def compute(
        self, closure: Closure, part: Part, batch: Mapping[str, Any], step: int
    ) -> torch.Tensor:
        """Make the gradient of each of this rank's lanes; return the summed loss of all of them."""
        self._kept.clear()
        total = torch.zeros(())
        begin = 0
        for lane, rows in part.lanes:
            piece = {name: values[begin : begin + rows] for name, values in batch.items()}
            begin += rows
            if not rows:
                continue
            torch.manual_seed(hash((self._seed, step, lane)) % 2**63)
            self._gradients.clear(alone=False)
            loss = closure(piece)
            loss.backward()
            self._kept[lane] = self._gradients.copy(loss, rows)
            total += loss.detach().cpu()
        return total

    def reduce(self, group: Group, *, ended: bool = False) -> Summed:
        """Add all lanes up in their order, on every rank; collective.

        Raises:
            PeerLost: a worker went away; the gradients are spoiled.
        """
        sums = self._gradients.zeros()
        for lane in range(self._lanes):
            owner = lane % group.world_size
            flats = self._kept.get(lane) if owner == group.rank else None
            for total, flat in zip(sums, flats or self._gradients.zeros(), strict=True):
                group.broadcast(flat, owner)
                total += flat
        self._kept.clear()
        return self._gradients.take(sums, group, ended=ended)


def refuse_statistics(nets: Mapping[str, torch.nn.Module]) -> None:
    """Refuse nets whose running statistics would depend on who saw which rows.

    Raises:
        TrainingError: a module keeps such statistics.
    """
    for name, net in nets.items():
        modules: Any = net.named_modules()
        for where, module in modules:
            tracks = getattr(module, "track_running_stats", False)
            if tracks and getattr(module, "running_mean", None) is not None and module.training:
                raise TrainingError(
                    f"exact=True cannot keep the running statistics of {name}.{where} "
                    f"({type(module).__name__}) equal at any world size: use a layer without them, "
                    "such as GroupNorm, or put it into eval mode before worker.attach"
                )
