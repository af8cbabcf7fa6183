"""A picture of the pauses: seconds without a new step, by what happened and by peer."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.elastic_changes import WORDS, Cost
from benchmarks.elastic_kills import Loss

Pauses = dict[str, dict[str, list[float]]]


def pauses_of(killed: dict[str, list[Loss]], changed: dict[str, dict[str, Cost]]) -> Pauses:
    """Return the seconds without a new step; of what has been measured so far."""
    found: Pauses = {
        "worker killed": {
            p: [x.cost.pause for x in losses if x.cost.pause is not None]
            for p, losses in killed.items()
        }
    }
    for change, words in WORDS.items():
        found[words] = {
            peer: [
                cost.pause
                for name, cost in run.items()
                if name.split()[0] == change and cost.pause is not None
            ]
            for peer, run in changed.items()
        }
    return {what: by_peer for what, by_peer in found.items() if any(by_peer.values())}


def draw(pauses: Pauses, target: Path) -> None:
    """Draw them, where matplotlib is installed (the ``bench`` extra)."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return

    mpl.use("Agg")
    from matplotlib import pyplot

    height = sum(0.7 + 0.35 * len(by_peer) for by_peer in pauses.values()) + 0.6
    figure, panels = pyplot.subplots(
        len(pauses), 1, figsize=(6, height), sharex=True, squeeze=False, layout="constrained"
    )
    for axes, (what, by_peer) in zip(panels[:, 0], pauses.items(), strict=True):
        for place, values in enumerate(by_peer.values()):
            axes.plot(values, [place] * len(values), "o", alpha=0.6)
        axes.set_yticks(range(len(by_peer)), list(by_peer))
        axes.set_ylim(-0.6, len(by_peer) - 0.4)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(what, fontsize="medium", loc="left")
        axes.set_xscale("log")
    panels[-1, 0].set_xlabel("seconds without a new step")
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
