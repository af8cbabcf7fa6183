"""What a run does not train: written once, and referred to by all its checkpoints.

A frozen parameter stays what it was when the workers came together, as long as it requires no
gradient and torch has counted no change of it. Any other is trained, and is in every checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lepton import checkpoints
from lepton.checkpoints import Manifest
from lepton.errors import CheckpointError
from lepton.training.plan import Plan

Entries = dict[str, dict[str, Any]]
"""Files as a manifest names them."""


class Frozen:
    """Knows which parameters are frozen, and where they are kept.

    Args:
        plan: of the run.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._versions: dict[str, int] = {}
        self._held: dict[str, torch.Tensor] = {}
        self._entries: Entries = {}

    def look(self, attached: Mapping[str, Any]) -> None:
        """See what is frozen now that everything attached has its state."""
        if not self._plan.trainable_only:
            return
        found = {p: t for p, t in _parameters(attached).items() if not t.requires_grad}
        versions = {path: t._version for path, t in found.items()}
        if versions != self._versions:  # or what was kept is still what there is
            self._versions, self._held, self._entries = versions, {}, {}

    def of(self, attached: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return what is frozen, by path in the state, on the CPU; copied at most once."""
        if not self._versions:
            return {}
        now = _parameters(attached)
        same = {
            path: now[path]
            for path, version in self._versions.items()
            if path in now and not now[path].requires_grad and now[path]._version == version
        }
        for path, tensor in same.items():
            if path not in self._held:
                self._held[path] = tensor.detach().cpu()
        return {path: self._held[path] for path in same}

    def entries(
        self,
        frozen: Mapping[str, torch.Tensor],
        step: int,
        program: Path | None,
        signature: Mapping[str, Any] | None,
    ) -> Entries:
        """Return the files that a checkpoint shares with others, written if they are not yet.

        Args:
            frozen: what :meth:`of` returned.
            step: of the checkpoint.
            program: the exported net; its weights are as large as what is frozen.
            signature: of the program.

        Raises:
            CheckpointError: they cannot be written, or the newest checkpoint cannot be read.
        """
        if not frozen:
            return {}
        if not self._entries or (program is not None and checkpoints.PROGRAM not in self._entries):
            identity = identity_of(frozen)
            kept = self._known(identity, signature if program else None)
            missing: dict[str, Any] = {}
            if checkpoints.BASE not in kept:
                missing[checkpoints.BASE] = {p: t.clone() for p, t in frozen.items()}  # tied ones
            if program is not None and checkpoints.PROGRAM not in kept:
                missing[checkpoints.PROGRAM] = program
            if missing:
                told = (self._plan.kept_in, step, missing, self._plan.options)
                kept |= checkpoints.write_shared(*told)
            kept[checkpoints.BASE]["identity"] = identity
            self._entries = kept
        return self._entries

    def _known(self, identity: str, signature: Mapping[str, Any] | None) -> Entries:
        """Return what the newest checkpoint refers to and is the same."""
        newest = _newest(self._plan)
        files: Entries = {n: dict(f) for n, f in newest.files.items()} if newest else {}
        base, program = files.get(checkpoints.BASE), files.get(checkpoints.PROGRAM)
        if newest is None or base is None or base.get("identity") != identity:
            return {}
        kept = {checkpoints.BASE: base}
        if program and "in" in program and signature is not None and newest.signature == signature:
            kept[checkpoints.PROGRAM] = program
        return kept


def identity_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a hash of names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for path, tensor in sorted(tensors.items()):
        digest.update(f"{path} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(flat.numpy()))  # pyright: ignore[reportArgumentType] - it is a buffer
    return digest.hexdigest()


def _newest(plan: Plan) -> Manifest | None:
    try:
        found = checkpoints.all_of(plan.kept_in, plan.options)
    except CheckpointError:
        return None
    return found[-1] if found else None


def _parameters(attached: Mapping[str, Any]) -> dict[str, torch.nn.Parameter]:
    """All parameters of all nets, by path in the state; tied ones by each of their names."""
    return {
        f"/{name}/{key}": parameter
        for name, net in attached.items()
        if isinstance(net, torch.nn.Module)
        for key, parameter in net.named_parameters(remove_duplicate=False)
    }
