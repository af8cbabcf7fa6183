"""Pictures of what was measured: a dot each, by what happened and by peer."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

Panels = Mapping[str, Mapping[str, Sequence[float]]]
"""By title and peer."""


def draw(shown: Panels, target: Path, unit: str) -> None:
    """Draw them, where matplotlib is installed (the ``bench`` extra)."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return

    mpl.use("Agg")
    from matplotlib import pyplot

    height = sum(0.7 + 0.35 * len(by_peer) for by_peer in shown.values()) + 0.6
    figure, places = pyplot.subplots(
        len(shown), 1, figsize=(6, height), sharex=True, squeeze=False, layout="constrained"
    )
    for axes, (what, by_peer) in zip(places[:, 0], shown.items(), strict=True):
        for place, values in enumerate(by_peer.values()):
            axes.plot(values, [place] * len(values), "o", alpha=0.6)
        axes.set_yticks(range(len(by_peer)), list(by_peer))
        axes.set_ylim(-0.6, len(by_peer) - 0.4)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(what, fontsize="medium", loc="left")
        axes.set_xscale("log")
    places[-1, 0].set_xlabel(unit)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
