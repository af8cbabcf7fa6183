"""What a worker's attached things hold: handing it to newcomers, and putting a step back.

A step that could not be made because a peer went away is made again with other rows. What the first
try left behind must not count: random numbers drawn, running statistics, schedules stepped on. The
weights and the optimisers' moments change only when a step is made, so they need no copy.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch

from lepton import checkpoints
from lepton.errors import CheckpointError
from lepton.training.differences import Outline, differences, other_model
from lepton.training.group import Group

T = TypeVar("T")


class Before:
    """What a step may change without being made: taken before it, given back if it was not."""

    def __init__(self, attached: Mapping[str, Any]) -> None:
        self._attached = attached
        self._random = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        self._buffers = [b.clone() for b in _buffers(attached)]
        self._groups = [_settings(o) for o in _of(attached, torch.optim.Optimizer)]
        self._others = {n: copy.deepcopy(t.state_dict()) for n, t in _others(attached).items()}

    def restore(self) -> None:
        """Put everything back. The gradients are for the caller to clear."""
        torch.set_rng_state(self._random)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)
        for now, before in zip(_buffers(self._attached), self._buffers, strict=True):
            now.copy_(before)
        for opt, groups in zip(
            _of(self._attached, torch.optim.Optimizer), self._groups, strict=True
        ):
            for group, settings in zip(opt.param_groups, groups, strict=True):
                group.update(settings)
        for name, state in self._others.items():
            self._attached[name].load_state_dict(state)


def hand_over(attached: Mapping[str, Any], group: Group, extra: Any) -> Any:
    """Give the source's state to the ranks that are behind; collective.

    Args:
        attached: name to net, optimiser or other thing with a state.
        group: with a place that has a source.
        extra: plain values that go along, from the source.

    Returns:
        the source's ``extra``, on every rank.

    Raises:
        PeerLost: a worker went away meanwhile.
        TrainingError: a newcomer attached other things than the source has.
    """
    place = group.place
    assert place.source is not None  # noqa: S101 - the caller asked
    mine = place.rank == place.source
    state = {name: thing.state_dict() for name, thing in attached.items()} if mine else {}
    tensors, tree = checkpoints.split(state) if mine else ({}, None)
    meta = [(k, str(t.dtype), tuple(t.shape)) for k, t in tensors.items()]
    meta, tree, extra = group.share((meta, tree, extra), place.source)
    device = _device_of(attached)
    received: dict[str, torch.Tensor] = {}
    for name, dtype, shape in meta:
        kind = getattr(torch, dtype.removeprefix("torch."))
        value = tensors[name].to(device) if mine else torch.empty(shape, dtype=kind, device=device)
        value = value.contiguous()
        group.broadcast(value, place.source)
        received[name] = value
    if place.rank in place.behind:
        load(attached, checkpoints.joined(tree, received))
    return extra


def load(attached: Mapping[str, Any], state: Mapping[str, Any], where: str = "the state") -> None:
    """Load each thing's state; nothing is loaded unless all of it fits.

    Args:
        attached: name to net, optimiser or other thing with a state.
        state: name to what its ``state_dict()`` was.
        where: what it comes from, for the message.

    Raises:
        CheckpointError: the state is of other things, or of other shapes; it says of which.
    """
    now = {name: thing.state_dict() for name, thing in attached.items()}
    nets = {n for n, t in attached.items() if isinstance(t, torch.nn.Module)}
    found = differences(_outline(state, nets), _outline(now, nets))
    if found:
        raise CheckpointError(other_model(where, found))
    for name, thing in attached.items():
        try:
            thing.load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError) as e:
            raise CheckpointError(other_model(where, [f"{name}: {e}"])) from e


def _outline(state: Mapping[str, Any], nets: set[str]) -> dict[str, Outline]:
    """What each thing's state is made of, without its values."""
    return {name: _sketch(found, name in nets) for name, found in state.items()}


def _sketch(found: Any, is_net: bool) -> Outline:
    if not isinstance(found, Mapping):
        return None
    named = cast("Mapping[str, Any]", found)
    if is_net:
        return {k: tuple(v.shape) for k, v in named.items() if isinstance(v, torch.Tensor)}
    groups: list[Mapping[str, Any]] | None = named.get("param_groups")
    if groups is None:
        return None
    return [(len(g["params"]), frozenset(g) - {"params"}) for g in groups]


def _device_of(attached: Mapping[str, Any]) -> torch.device:
    for net in _of(attached, torch.nn.Module):
        for parameter in net.parameters():
            return parameter.device
    return torch.device("cpu")


def _of(attached: Mapping[str, Any], kind: type[T]) -> list[T]:
    return [t for t in attached.values() if isinstance(t, kind)]


def _others(attached: Mapping[str, Any]) -> dict[str, Any]:
    known = (torch.nn.Module, torch.optim.Optimizer)
    return {n: t for n, t in attached.items() if not isinstance(t, known)}


def _buffers(attached: Mapping[str, Any]) -> list[torch.Tensor]:
    return [b for net in _of(attached, torch.nn.Module) for b in net.buffers()]


def _settings(opt: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
