"""Which checkpoints of a run are kept: the newest, the best, and whatever a model was made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lepton import checkpoints
from lepton.checkpoints import Manifest
from lepton.registry import Registry

BEST_BY = "loss"


def superfluous(
    kept: Sequence[Manifest], newest: int, registered: frozenset[str]
) -> list[Manifest]:
    """Return the checkpoints that may go. Pure.

    Args:
        kept: a run's checkpoints, by step.
        newest: how many of the newest stay. The one with the lowest loss stays, too.
        registered: addresses of manifests that model versions were made of: these stay.
    """
    with_loss = [m for m in kept if BEST_BY in m.metrics]
    best = min(with_loss, key=lambda m: m.metrics[BEST_BY]).uri if with_loss else ""
    return [m for m in kept[: max(0, len(kept) - newest)] if m.uri not in {best, *registered}]


def thin_out(
    folder: str, newest: int, home: Path, options: Mapping[str, str] | None = None
) -> list[Manifest]:
    """Remove a run's superfluous checkpoints; return them.

    The manifest goes first: a checkpoint is whole or invisible while it goes, too. The registry is
    only asked when something is about to go; what it names by then stays.
    """
    going = superfluous(checkpoints.all_of(folder, options), newest, frozenset())
    if not going:
        return []
    going = superfluous(checkpoints.all_of(folder, options), newest, _registered(home))
    for manifest in going:
        checkpoints.remove(manifest)
    return going


def _registered(home: Path) -> frozenset[str]:
    where = home / "registry"
    if not where.is_dir():
        return frozenset()
    registry = Registry(where)
    return frozenset(
        version.checkpoint
        for model in registry.models()
        for version in registry.state(model).versions.values()
    )
