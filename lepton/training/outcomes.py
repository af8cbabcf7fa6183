"""What ``lepton plan`` prints: a forecast before a run, and how far off it was after it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from lepton.lake import table
from lepton.training.forecast import Forecast
from lepton.training.planner import outcome_of, plan
from lepton.training.run import load_run


def predict(arguments: argparse.Namespace, console: Console) -> int:
    """Print a forecast; status 1 if no number of workers meets the deadline."""
    rows = arguments.rows
    if rows is None:
        rows = table(arguments.table).count_rows() * arguments.epochs
    found = plan(
        arguments.runs,
        workers=arguments.workers,
        rows=rows,
        deadline=arguments.deadline,
        price=arguments.price,
        write_to=arguments.write_to,
        home=arguments.home,
    )
    missed = found.best is None
    if arguments.json:
        best = None if found.best is None else found.best.workers
        console.print_json(json.dumps({**asdict(found), "best": best}))
        return int(missed)
    console.print(_shown(found))
    for line in _said(found):
        console.print(line, highlight=False, soft_wrap=True)
    return int(missed)


def show(runs: Sequence[str], home: str | None, console: Console) -> int:
    """Print how far off forecasts were; status 1 if a run has none."""
    known = 0
    for name in runs:
        outcome = outcome_of(load_run(name, home))
        known += outcome is not None
        said = "has no forecast: make one with --for" if outcome is None else str(outcome)
        console.print(f"run {name} {said}", highlight=False, soft_wrap=True)
    return int(known < len(runs))


def _shown(found: Forecast) -> Table:
    priced = found.choices[0].cost is not None
    shown = Table("workers", "time", "worker-seconds", *(["cost"] if priced else []), "efficiency")
    for choice in found.choices:
        best = found.best is not None and choice.workers == found.best.workers
        cells = [
            f"{choice.workers}{' ←' if best else ''}",
            _span(choice.seconds),
            f"{choice.worker_seconds:,.0f}",
            *([] if choice.cost is None else [f"{choice.cost:,.2f}"]),
            f"{choice.efficiency:.0%}{'' if not choice.extrapolated else ' ?'}",
        ]
        shown.add_row(*cells, style="bold" if best else None)
    return shown


def _said(found: Forecast) -> list[str]:
    pace = found.pace
    sizes = ", ".join(str(n) for n in pace.sizes)
    lines = [
        f"from {pace.rows_per_second:,.0f} rows/s of one worker and {pace.start:.1f} s until the "
        f"first step, measured with {sizes} workers"
    ]
    if len(pace.sizes) == 1:
        lines.append("scaling was not measured and is taken to be perfect: name further runs")
    elif any(c.extrapolated for c in found.choices):
        lines.append("? lies outside of what was measured")
    if found.best is None:
        quickest = min(found.choices, key=lambda c: c.seconds)
        lines.append(
            f"none meets the deadline of {_span(found.deadline or 0)}: the quickest has "
            f"{quickest.workers} workers and takes {_span(quickest.seconds)}"
        )
    return lines


def _span(seconds: float) -> str:
    whole = round(seconds)
    if whole < 120:
        return f"{seconds:.1f} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"
