"""Summing gradients over ranks, and dividing by the rows of the global batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from lepton.training.group import Group

_scale_all: Any = vars(torch)["_foreach_mul_"]  # one call for all, as torch's optimisers do

FACTS = 5


@dataclass(frozen=True, slots=True)
class Summed:
    """What all ranks know after a step's collective.

    Attributes:
        mean: loss over the global batch.
        called: ranks that were called to come together after this step.
        leaving: ranks that know that somebody is to leave then.
        ended: ranks whose loop has ended without exhausting the stream.
    """

    mean: float
    called: int
    leaving: int
    ended: int


class Gradients:
    """The gradients of all trained parameters, laid end to end, one tensor a data type.

    Those of a sharded parameter FSDP sums itself. Each other parameter's ``grad`` is a view of its
    place, so summing over ranks copies nothing. What a loop put elsewhere (``opt.zero_grad()``
    drops the views) is copied into its place first. The tensor of 32-bit floats carries the loss,
    the rows and the flags too, so that all ranks learn of them in the same step and without
    another collective.

    Args:
        nets: whose parameters; those that need no gradient are left out.
    """

    def __init__(self, nets: Iterable[torch.nn.Module]) -> None:
        self._nets = list(nets)
        self._trained: list[torch.nn.Parameter] = []
        self._wanted: list[torch.nn.Parameter] = []
        self._sharded: list[torch.nn.Parameter] = []
        self._places: list[torch.Tensor] = []
        self._flats: list[torch.Tensor] = []
        self._facts = torch.zeros(0)

    def reduce(
        self,
        loss: torch.Tensor,
        rows: int,
        group: Group,
        *,
        divided: float = 1.0,
        ended: bool = False,
    ) -> Summed:
        """Make every gradient the mean over the global batch, on every rank; collective.

        Args:
            loss: summed over this rank's rows.
            rows: how many those are; a transform may have dropped some of the planned ones.
            group: the ranks.
            divided: what the gradients have been divided by on the way here.
            ended: whether this rank's loop has ended early.

        Raises:
            PeerLost: a worker went away; the gradients are spoiled.
        """
        seat = group.seat
        flags = (False, False) if seat is None else (seat.called, seat.leaving)
        if group.world_size == 1:
            self._scale(divided / max(1, rows), 1)
            mean = float(loss.detach()) / max(1, rows)
            return Summed(mean, int(flags[0]), int(flags[1]), int(ended))
        self._gather()
        self._facts.copy_(torch.tensor([0.0, rows, *flags, ended], dtype=torch.float32))
        self._facts[0] = loss.detach()
        for flat in self._flats:
            group.all_reduce(flat)
        return self._found(divided, group.world_size)

    def _found(self, divided: float, ranks: int) -> Summed:
        """Divide by the rows of the global batch; return what was summed beside the gradients."""
        numbers: list[float] = self._facts.tolist()
        total, count, called, leaving, early = numbers
        self._scale(divided / max(1.0, count), ranks)
        return Summed(total / max(1.0, count), int(called), int(leaving), int(early))

    def copy(self, loss: torch.Tensor, rows: int) -> list[torch.Tensor]:
        """Return a copy of all gradients, with the loss and the rows that they are of."""
        self._gather()
        self._facts.copy_(torch.tensor([0.0, rows, 0, 0, 0], dtype=torch.float32))
        self._facts[0] = loss.detach()
        return [flat.clone() for flat in self._flats]

    def zeros(self) -> list[torch.Tensor]:
        """Return zeros laid out as :meth:`copy` does."""
        self._gather()
        return [torch.zeros_like(flat) for flat in self._flats]

    def take(self, sums: list[torch.Tensor], group: Group, *, ended: bool) -> Summed:
        """Take gradients that were summed elsewhere; sum the flags over ranks; collective."""
        for flat, total in zip(self._flats, sums, strict=True):
            flat.copy_(total)
        seat = group.seat
        flags = (False, False) if seat is None else (seat.called, seat.leaving)
        shared = torch.tensor([*flags, ended], dtype=torch.float32, device=self._facts.device)
        group.all_reduce(shared)
        self._facts[2:] = shared
        return self._found(1.0, group.world_size)

    def _scale(self, by: float, ranks: int) -> None:
        """Multiply all gradients; those that FSDP took the mean of, by the ranks, too."""
        if by == 1.0 and not self._sharded:
            return
        given = [p.grad for net in self._nets for p in net.parameters() if p.grad is not None]
        parts = [g for g in given if isinstance(g, DTensor)] if self._sharded else []
        if parts:
            given = [g for g in given if not isinstance(g, DTensor)]
            _scale_all(parts, by * ranks)
        if given:
            _scale_all(given, by)

    def clear(self, *, alone: bool) -> None:
        """Forget every gradient; alone, the next ones need no place beside others."""
        if alone:
            self._wanted, self._trained, self._places, self._flats = [], [], [], []
            for net in self._nets:
                net.zero_grad(set_to_none=True)
        for flat in self._flats:
            flat.zero_()
        for p in self._sharded:
            p.grad = None

    def _gather(self) -> None:
        """See that every trained parameter's gradient is in its place."""
        wanted = [p for net in self._nets for p in net.parameters() if p.requires_grad]
        if len(wanted) != len(self._wanted) or any(
            a is not b for a, b in zip(wanted, self._wanted, strict=True)
        ):
            self._wanted = wanted
            self._sharded = [p for p in wanted if isinstance(p, DTensor)]
            self._lay_out([p for p in wanted if not isinstance(p, DTensor)])
        for p, place in zip(self._trained, self._places, strict=True):
            grad = p.grad
            if grad is place:
                continue
            if grad is None:
                place.zero_()
            else:
                place.copy_(grad)
            p.grad = place

    def _lay_out(self, trained: list[torch.nn.Parameter]) -> None:
        """Make room for other parameters than before."""
        sizes: dict[tuple[torch.dtype, torch.device], int] = {}
        device = trained[0].device if trained else torch.device("cpu")
        sizes[torch.float32, device] = FACTS
        at: list[tuple[tuple[torch.dtype, torch.device], int]] = []
        for p in trained:
            key = (p.dtype, p.device)
            at.append((key, sizes.get(key, 0)))
            sizes[key] = at[-1][1] + p.numel()
        flats = {key: torch.zeros(size, dtype=key[0], device=key[1]) for key, size in sizes.items()}
        self._facts = flats[torch.float32, device][:FACTS]
        self._places = [
            flats[key][begin : begin + p.numel()].view_as(p)
            for p, (key, begin) in zip(trained, at, strict=True)
        ]
        self._flats = list(flats.values())
        self._trained = trained
