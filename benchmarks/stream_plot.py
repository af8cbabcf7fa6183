"""A picture of ``benchmarks/results/stream.json``: throughput as a ratio to the scan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"ours": "#2a6f97", "shuffles": "#c77d3a", "in order": "#b8b8b8", "reference": "#6d6d6d"}


def plot(found: dict[str, Any], target: Path) -> None:
    """Draw one panel a table, fastest peer first."""
    tables = found["tables"]
    figure, panels = plt.subplots(
        1, len(tables), figsize=(6.2 * len(tables), 6), squeeze=False, layout="constrained"
    )
    for panel, (table, result) in zip(panels[0], tables.items(), strict=True):
        peers = {n: p for n, p in result["peers"].items() if p.get("ratio") is not None}
        names = sorted(peers, key=lambda n: peers[n]["ratio"])
        colours = [COLOURS[_group(n, peers[n])] for n in names]
        bars = panel.barh(names, [peers[n]["ratio"] for n in names], color=colours)
        labels = [f"{peers[n]['ratio']:.2f}  ({peers[n]['peak_mb']:.0f} MB)" for n in names]
        panel.bar_label(bars, labels, padding=3, fontsize=8)
        panel.set_title(f"{table}: {result['rows']:,} rows, {result['mb']:,.0f} MB", fontsize=10)
        panel.set_xlabel("rows per second, scan = 1 (peak memory of the consumer's process)")
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.22)
    keys = [mpl.patches.Patch(color=c, label=n) for n, c in COLOURS.items()]
    panels[0][-1].legend(handles=keys, loc="lower right", frameon=False)
    figure.savefig(target, dpi=130)
    plt.close(figure)


def _group(name: str, peer: dict[str, Any]) -> str:
    if name.startswith("lepton"):
        return "ours"
    if name.startswith("scan"):
        return "reference"
    return "shuffles" if peer["shuffles"] else "in order"
