"""Sharded models: parameters of which every rank holds its own part (FSDP2's ``fully_shard``).

A worker that is lost takes its part with it, so a sharded run mends losses otherwise than one whose
ranks all hold everything: all ranks go back to the newest checkpoint, in the same processes, with
another mesh (:mod:`lepton.training.rounds`).
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed.tensor as tensors_of_torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from lepton.checkpoints.shards import Fill, Laid
from lepton.errors import TrainingError
from lepton.training.group import Group
from lepton.training.plan import Plan

spread: Any = tensors_of_torch._utils.compute_local_shape_and_global_offset  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue] - DCP's own


def mesh_of(group: Group, device: torch.device) -> DeviceMesh:
    """Return all ranks of a generation in a row."""
    if group.world_size == 1:
        group.connect_alone()
    return init_device_mesh(device.type, (group.world_size,))


def is_sharded(nets: Iterable[torch.nn.Module]) -> bool:
    """Whether any parameter is held in parts."""
    return any(isinstance(p, DTensor) for net in nets for p in net.parameters())


def reshard(nets: Iterable[torch.nn.Module]) -> None:
    """Let go of the whole parameters that a forward call without a backward one left behind."""
    from torch.distributed.fsdp import FSDPModule

    for net in nets:
        for module in net.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def unsharded(found: Iterable[Any]) -> list[torch.Tensor]:
    """Return the tensors that every rank holds as a whole."""
    return [t for t in found if not isinstance(t, DTensor)]


def refuse_unmet(nets: Iterable[torch.nn.Module]) -> None:
    """Refuse a net that was sharded over other ranks than the run's.

    Raises:
        TrainingError: so it is.
    """
    if is_sharded(nets):
        raise TrainingError(
            "an attached net is sharded over a mesh of its own: shard it over the run's, by "
            "fully_shard(net, mesh=worker.mesh)"
        )


def refuse(plan: Plan) -> None:
    """Refuse what a sharded run cannot do.

    Raises:
        TrainingError: the run is to be exact or trainable_only.
    """
    if plan.trainable_only:
        raise TrainingError(
            "a run over worker.mesh cannot be trainable_only=True: ranks write all of their parts"
        )
    if plan.exact:
        raise TrainingError(
            "a run over worker.mesh cannot be exact=True: FSDP sums gradients in an order that "
            "depends on the number of workers; train without one of the two"
        )


def filler(attached: Mapping[str, Any]) -> Fill:
    """Return what makes of saved tensors this rank's parts, at any number of ranks.

    Args:
        attached: name to what the state is to be loaded into; its sharding is what counts.
    """
    like: dict[str, DTensor] = {}
    for name, thing in attached.items():
        if isinstance(thing, torch.nn.Module):
            found = {f"/{name}/{k}": v for k, v in thing.state_dict().items()}
        elif isinstance(thing, torch.optim.Optimizer):
            ordered = [p for group in thing.param_groups for p in group["params"]]
            found = {f"/{name}/state/{i}": p for i, p in enumerate(ordered)}
        else:
            continue
        like |= {path: t for path, t in found.items() if isinstance(t, DTensor)}

    def fill(path: str, laid: Laid) -> torch.Tensor | None:
        model = like.get(path)
        if model is None:  # an optimiser's figure about a parameter
            model = like.get(path.rpartition("/")[0])
        if model is None or tuple(model.shape) != laid.shape:
            return None
        shape, offset = spread(model.shape, model.device_mesh, model.placements)
        local = laid.read(offset, shape).to(model.device)
        return DTensor.from_local(
            local,
            model.device_mesh,
            model.placements,
            run_check=False,
            shape=model.shape,
            stride=model.stride(),
        )

    return fill


def gathered(net: torch.nn.Module, *, keep: bool) -> torch.nn.Module | None:
    """Return a copy of a net with whole parameters and without FSDP's hooks; collective.

    Args:
        net: sharded as a whole or in part.
        keep: whether this rank wants it; the others only give their parts.
    """
    made: Any = None
    if keep:
        made = object.__new__(_plain(type(net)))
        kept = {k: v for k, v in vars(net).items() if not k.startswith(_OF_FSDP)}
        made.__dict__.update(kept)
        for name in vars(torch.nn.Module()):
            if name.endswith("_hooks") or name.endswith("_hooks_with_kwargs"):
                made.__dict__[name] = collections.OrderedDict()
    own, below = (vars(net)[name] for name in ("_parameters", "_modules"))
    parameters = {n: _whole(p) for n, p in own.items()}
    children = {n: m and gathered(m, keep=keep) for n, m in below.items()}
    if made is None:
        return None
    made.__dict__["_parameters"] = {
        n: None if p is None else torch.nn.Parameter(p, requires_grad=p.requires_grad)
        for n, p in parameters.items()
    }
    made.__dict__["_modules"] = children
    return made


_OF_FSDP = ("__composable_api_state_key", "_fsdp", "_is_fsdp")
"""What ``fully_shard`` adds to a module's attributes."""


def _plain(kind: type) -> type:
    """The class that a module had before ``fully_shard`` changed it."""
    from torch.distributed.fsdp import FSDPModule

    return (
        kind.__mro__[kind.__mro__.index(FSDPModule) + 1] if issubclass(kind, FSDPModule) else kind
    )


def _whole(parameter: torch.Tensor | None) -> torch.Tensor | None:
    if parameter is None:
        return None
    found = parameter.detach()
    return found.full_tensor() if isinstance(found, DTensor) else found
