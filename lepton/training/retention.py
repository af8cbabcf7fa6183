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
    return next(iter(ranked(kept, by, mode)), None)


def ranked(kept: Sequence[Manifest], by: str = BEST_BY, mode: str = "min") -> list[Manifest]:
    """Return the checkpoints that have a figure, the best first; see :func:`best_of`. Pure."""
    sign = -1.0 if mode == "max" else 1.0
    known = [m for m in kept if not math.isnan(m.metrics.get(by, math.nan))]
    return sorted(known, key=lambda m: sign * m.metrics[by])


def superfluous(kept: Sequence[Manifest], newest: int, staying: frozenset[str]) -> list[Manifest]:
    """Return the checkpoints that may go. Pure.

    Args:
        kept: a run's checkpoints, by step.
        newest: how many of the newest stay. The one with the lowest loss stays, too.
        staying: addresses of manifests that stay in any case.
    """
    best = best_of(kept)
    kept_on = {best.uri if best else "", *staying}
    return [m for m in kept[: max(0, len(kept) - newest)] if m.uri not in kept_on]


def thin_out(
    folder: str,
    newest: int,
    home: Path,
    stop: EarlyStopping | None = None,
    options: Mapping[str, str] | None = None,
    *,
    best: int = 1,
) -> list[Manifest]:
    """Remove a run's superfluous checkpoints; return them.

    So many of the best stay, too: by the figure of the rule to stop, or the loss without one.

    The manifest goes first: a checkpoint is whole or invisible while it goes, too. The registry is
    only asked when something is about to go; what it names by then stays.
    """
    kept = checkpoints.all_of(folder, options)
    order = ranked(kept, stop.metric, stop.mode) if stop else ranked(kept)
    staying = frozenset(m.uri for m in order[:best])
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
