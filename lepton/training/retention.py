"""Which checkpoints of a run are kept: the newest, the best, and whatever a model was made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from lepton import checkpoints
from lepton.checkpoints import Manifest
from lepton.registry import Registry
from lepton.training.stopping import EarlyStopping

BEST_BY = "loss"


def best_of(kept: Sequence[Manifest], by: str = BEST_BY, mode: str = "min") -> Manifest | None:
    """Return the checkpoint with the best figure, the first of equals; None without any. Pure.

    Args:
        kept: a run's checkpoints, by step.
        by: the figure.
        mode: whether ``"max"`` or ``"min"`` is better.
    """
    sign = -1.0 if mode == "max" else 1.0
    known = [m for m in kept if not math.isnan(m.metrics.get(by, math.nan))]
    return min(known, key=lambda m: sign * m.metrics[by]) if known else None


def superfluous(
    kept: Sequence[Manifest], newest: int, registered: frozenset[str]
) -> list[Manifest]:
    """Return the checkpoints that may go. Pure.

    Args:
        kept: a run's checkpoints, by step.
        newest: how many of the newest stay. The one with the lowest loss stays, too.
        registered: addresses of manifests that model versions were made of: these stay.
    """
    best = best_of(kept)
    staying = {best.uri if best else "", *registered}
    return [m for m in kept[: max(0, len(kept) - newest)] if m.uri not in staying]


def thin_out(
    folder: str,
    newest: int,
    home: Path,
    stop: EarlyStopping | None = None,
    options: Mapping[str, str] | None = None,
) -> list[Manifest]:
    """Remove a run's superfluous checkpoints; return them.

    With a rule to stop, the best one by its figure stays as well.

    The manifest goes first: a checkpoint is whole or invisible while it goes, too. The registry is
    only asked when something is about to go; what it names by then stays.
    """
    kept = checkpoints.all_of(folder, options)
    best = best_of(kept, stop.metric, stop.mode) if stop else None
    staying = frozenset({best.uri} if best else ())
    if not superfluous(kept, newest, staying):
        return []
    going = superfluous(kept, newest, staying | _registered(home))
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
