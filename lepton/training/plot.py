"""A run as a picture, drawn from its folder with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lepton.errors import TrainingError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lepton.training.run import Pause, Run

BINS = 200
"""Points of the rows/s curve at the most."""
SHRUNK, GROWN = "tab:red", "tab:green"


def figure_of(run: Run) -> Figure:
    """Return the picture of a run.

    Raises:
        TrainingError: matplotlib is not installed, or no step was made yet.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as e:
        raise TrainingError(
            "run.plot() needs matplotlib, which is not installed: pip install 'lepton[plot]'"
        ) from e
    history, judged = run.history(), run.evaluations()
    if not len(history):
        raise TrainingError(f"run {run.name!r} has made no step yet: there is nothing to draw")
    steps = history["step"].to_numpy()
    figure = Figure(figsize=(9, 9 if len(judged) else 7), layout="constrained")
    axes: list[Any] = list(figure.subplots(4 if len(judged) else 3, sharex=True))
    axes[0].plot(steps, history["loss"].to_numpy(), linewidth=1)
    axes[0].set_ylabel("loss")
    axes[0].set_title(f"run {run.name}: {len(steps)} steps")
    if len(judged):
        _evaluations(axes[1], judged)
    times = history["time"].cast(pa.int64()).to_numpy() / 1e6
    axes[-2].plot(*rate_of(steps, history["rows"].to_numpy(), times), linewidth=1)
    axes[-2].set_ylabel("rows/s")
    axes[-2].set_ylim(bottom=0)
    axes[-1].step(steps, history["workers"].to_numpy(), where="mid")
    axes[-1].set_ylabel("workers")
    axes[-1].set_ylim(bottom=0)
    axes[-1].yaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel("step")
    _mark(axes, run.pauses)
    return figure


def rate_of(steps: Any, rows: Any, times: Any) -> tuple[Any, Any]:
    """Return rows a second over stretches of steps.

    Args:
        steps: number of each.
        rows: of each.
        times: when each was made, seconds.

    Returns:
        the last step of each stretch, and the rate over it; both empty for a single step.
    """
    edges = np.unique(np.linspace(0, len(steps) - 1, min(BINS, len(steps)), dtype=int))
    done = np.cumsum(rows)[edges].astype(float)
    lasted = np.maximum(np.diff(times[edges]), 1e-6)
    return steps[edges[1:]], np.diff(done) / lasted


def _evaluations(axis: Any, judged: Any) -> None:
    known = {"step", "epoch", "rows", "confusion", "seconds", "workers", "time", "table"}
    for name in judged.column_names:
        if name not in known:
            axis.plot(judged["step"].to_numpy(), judged[name].to_numpy(), ".-", label=name)
    axis.set_ylabel("validation")
    axis.legend(loc="best", fontsize="small")


def _mark(axes: Sequence[Any], pauses: Sequence[Pause]) -> None:
    """Draw a line through everything where the workers changed, and say how."""
    for pause in pauses:
        colour = GROWN if pause.after > pause.before else SHRUNK
        for axis in axes:
            axis.axvline(pause.step, color=colour, linewidth=1, alpha=0.6)
        again = f", {pause.replayed} again" if pause.replayed else ""
        axes[-1].annotate(
            f"{pause.before} → {pause.after}, {pause.seconds:.1f} s{again}",
            (pause.step, 0),
            xytext=(2, 4),
            textcoords="offset points",
            rotation=90,
            fontsize="x-small",
            color=colour,
        )
