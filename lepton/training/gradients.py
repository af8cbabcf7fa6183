"""Summing gradients over ranks, and dividing by the rows of the global batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lepton.training.group import Group


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


def reduce(
    nets: Iterable[torch.nn.Module],
    loss: torch.Tensor,
    rows: int,
    group: Group,
    *,
    ended: bool = False,
) -> Summed:
    """Make every net's gradients the mean over the global batch, on every rank; collective.

    One flat tensor a data type; the one of floats carries the loss, the rows and the flags too, so
    that all ranks learn of them in the same step and without another collective.

    Args:
        nets: whose gradients; a parameter without one takes part with zeros.
        loss: summed over this rank's rows.
        rows: how many those are; a transform may have dropped some of the planned ones.
        group: the ranks.
        ended: whether this rank's loop has ended early.

    Raises:
        PeerLost: a worker went away; the gradients are spoiled.
    """
    groups: dict[torch.dtype, list[torch.Tensor]] = {}
    seat = group.seat
    flags = (False, False) if seat is None else (seat.called, seat.leaving)
    facts = torch.tensor([0.0, rows, *flags, ended], dtype=torch.float32, device=loss.device)
    facts[0] = loss.detach().to(torch.float32).reshape(())
    groups[torch.float32] = [facts]
    for net in nets:
        for p in net.parameters():
            if p.requires_grad:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                groups.setdefault(p.grad.dtype, []).append(p.grad)
    divisor: torch.Tensor | None = None
    counts: list[float] = []
    for gradients in groups.values():
        flat = torch.cat([g.reshape(-1) for g in gradients])
        group.all_reduce(flat)
        if divisor is None:
            divisor = flat[1].clamp(min=1).clone()
            counts = flat[2:5].tolist()
        flat /= divisor
        at = 0
        for g in gradients:
            g.copy_(flat[at : at + g.numel()].view_as(g))
            at += g.numel()
    called, leaving, early = (int(n) for n in counts)
    return Summed(float(facts[0]), called, leaving, early)
