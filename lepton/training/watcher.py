"""Watches which columns feed which net, so that the net can be exported for serving.

Nothing is asked of the person: the first forward call of training shows it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lepton.errors import CheckpointError
from lepton.export import Signature, export_net
from lepton.export.program import inputs_of
from lepton.export.recorded import Twin, example_of


@dataclass
class _Seen:
    """The first forward call of a net on a batch."""

    net: torch.nn.Module
    called: bool = False
    stands_in: bool = False
    args: tuple[torch.Tensor, ...] = ()
    inputs: list[str] | None = None


class Watcher:
    """Sees the first forward call of each net and exports the one that takes columns.

    Args:
        batch: returns the batch under way, empty when there is none.

    Attributes:
        twin: answers some rows of the first batch with any weights, once the net is exported.
    """

    def __init__(self, batch: Callable[[], Mapping[str, Any]]) -> None:
        self._batch = batch
        self._seen: dict[str, _Seen] = {}
        self._exported: tuple[Signature | None, str | None] | None = None
        self.twin: Twin | None = None

    def watch(self, name: str, net: torch.nn.Module, called: torch.nn.Module) -> None:
        """Begin to watch a net.

        Args:
            name: what it is attached as.
            net: what is kept and exported.
            called: what the loop calls: the net, or what torch.compile made of it.
        """
        seen = self._seen[name] = _Seen(net)

        def look(_: Any, args: tuple[Any, ...]) -> None:
            batch = self._batch()
            if batch and args and not seen.called:
                seen.called = True
                seen.inputs = inputs_of(net, args, batch)
                seen.args = example_of([a for a in args if hasattr(a, "detach")])
                handle.remove()

        handle = called.register_forward_pre_hook(look)

    def stand_in(self, name: str, net: torch.nn.Module) -> None:
        """Have a net exported in place of the one that is trained, which cannot be."""
        self._seen[name].net = net
        self._seen[name].stands_in = True

    def feed(self) -> tuple[str, list[tuple[str, str]]] | None:
        """Return the one net that columns go through, and these with their data types."""
        called = [(name, seen) for name, seen in self._seen.items() if seen.called]
        if len(called) != 1 or called[0][1].inputs is None:
            return None
        name, seen = called[0]
        kinds = [str(a.dtype).removeprefix("torch.") for a in seen.args]
        return name, list(zip(seen.inputs or [], kinds, strict=True))

    def export(self, path: Path) -> tuple[Signature | None, str | None]:
        """Export the net once; return its signature, or None and why it cannot be served."""
        if self._exported is None:
            self._exported = self._export(path)
        return self._exported

    def _export(self, path: Path) -> tuple[Signature | None, str | None]:
        called = [(name, seen) for name, seen in self._seen.items() if seen.called]
        if len(called) != 1:
            return None, (
                f"serving needs one attached net that the batches go through, {len(called)} did: "
                "wrap them in one module"
            )
        name, seen = called[0]
        if seen.inputs is None:
            return None, (
                f"cannot tell which columns feed {name!r}: pass column tensors to it as they come "
                "(reshape inside forward), with forward's arguments named like columns"
            )
        try:
            signature = export_net(seen.net, name, seen.inputs, seen.args, path)
        except CheckpointError as e:
            return None, str(e)
        if not seen.stands_in:  # of a sharded net no rank has the weights
            self.twin = Twin(copy.deepcopy(seen.net).to("cpu").eval(), signature, seen.args)
        return signature, None
