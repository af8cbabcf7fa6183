"""What the checkpoints of a run have in common: written once, and referred to by all of them.

That is the exported program, which has weights of its own (a checkpoint's are put in their place),
and with ``trainable_only`` what is frozen. A frozen parameter stays what it was when the workers
came together, as long as it requires no gradient and torch has counted no change of it. Any other
is trained, and is in every checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lepton import checkpoints
from lepton.checkpoints import Manifest
from lepton.errors import CheckpointError
from lepton.export.graph import digest_of
from lepton.training.plan import Plan

Entries = dict[str, dict[str, Any]]
"""Files as a manifest names them, each with an ``identity`` by which it is known again."""


class Frozen:
    """Knows which parameters are frozen, and where they and the program are kept.

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
            self._versions, self._held = versions, {}
            self._entries.pop(checkpoints.BASE, None)

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
        self, frozen: Mapping[str, torch.Tensor], step: int, program: Path | None
    ) -> Entries:
        """Return the files that a checkpoint shares with others, written if they are not yet.

        Args:
            frozen: what :meth:`of` returned.
            step: of the checkpoint.
            program: the exported net.

        Raises:
            CheckpointError: they cannot be written.
        """
        content: dict[str, Any] = {}
        if frozen:
            content[checkpoints.BASE] = frozen
        if program is not None:
            content[checkpoints.PROGRAM] = program
        lacking = {name: c for name, c in content.items() if name not in self._entries}
        if lacking:
            self._entries |= self._kept(lacking, step)
        return {name: entry for name, entry in self._entries.items() if name in content}

    def _kept(self, content: Mapping[str, Any], step: int) -> Entries:
        """Return where the newest checkpoint has the same; what it has not is written."""
        marks = {
            n: digest_of(c).hex() if _is_file(c) else identity_of(c) for n, c in content.items()
        }
        known = _known(self._plan)
        kept = {n: known[n] for n, mark in marks.items() if _mark(known.get(n)) == mark}
        missing = {
            name: c if _is_file(c) else {p: t.clone() for p, t in c.items()}  # tied ones
            for name, c in content.items()
            if name not in kept
        }
        if missing:
            kept |= checkpoints.write_shared(self._plan.kept_in, step, missing, self._plan.options)
        return {name: {**entry, "identity": marks[name]} for name, entry in kept.items()}


def _is_file(content: object) -> bool:
    return isinstance(content, Path)


def _mark(entry: Mapping[str, Any] | None) -> object:
    return entry.get("identity") if entry else None


def _known(plan: Plan) -> Entries:
    """Return the files that the newest checkpoint shares, as far as they are whole."""
    newest = _newest(plan)
    found: Entries = {}
    for name, entry in newest.files.items() if newest else ():
        if "in" in entry and newest is not None:
            with suppress(CheckpointError, OSError):
                newest.storage.check(newest.place(name), entry, thorough=False)
                found[name] = dict(entry)
    return found


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
