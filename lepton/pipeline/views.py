"""What the commands that look at things print and write; their flags are in :mod:`lepton.cli`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lepton.errors import LeptonError
from lepton.pipeline import listing
from lepton.pipeline.keeping import change_version
from lepton.pipeline.spantable import add_spans
from lepton.pipeline.tracing import Found, find_trace
from lepton.report.lanes import speed
from lepton.report.openlineage import events
from lepton.report.perfetto import perfetto
from lepton.report.tracepage import TracePage, render_trace
from lepton.report.tree import Line, summary, tree
from lepton.training import load_run

PIPE_WIDTH = 240
FEW = 4
"""Of a long list so many are shown of its beginning and of its end."""
TRIALS = ("canary", "shadow")


def trace(arguments: argparse.Namespace, console: Console) -> None:
    """Print a trace as a tree, or write it as what was asked for."""
    found = find_trace(arguments.which, arguments.home)
    if arguments.perfetto:
        body = perfetto(found.spans, found.trace_id, _curves(found))
        _put(arguments.perfetto, json.dumps(body))
        _say(console, f"{arguments.perfetto}: open it with https://ui.perfetto.dev")
    if arguments.html:
        _put(arguments.html, render_trace(_page(found)))
        _say(console, f"{arguments.html}: a page that needs no network")
    if arguments.to_table:
        kept, added = add_spans(found.spans, arguments.to_table)
        _say(console, f"{kept}: {added} of {len(found.spans)} spans added")
    if arguments.html or arguments.perfetto or arguments.to_table:
        return
    _say(console, f"trace {found.trace_id}\n{summary(found.spans)}")
    for line in tree(found.spans):
        console.print(_text(line), soft_wrap=True)
    for loss in found.losses:
        _say(console, f"with a killed process: {loss}")
    for other in _neighbours(found):
        _say(console, other)


def why(arguments: argparse.Namespace, console: Console) -> int:
    """Print an answer's way back; 1 if a stage of it is gone or changed."""
    from lepton.pipeline.origin import why as way_back

    origin = way_back(arguments.request_id, arguments.home)
    if arguments.json:
        _say(console, json.dumps(origin.to_json(), indent=1))
        return 0 if origin.whole else 1
    for stage in origin.stages:
        console.print(Text(f"{stage.kind:<11}", style="bold cyan") + stage.name, soft_wrap=True)
        for key, value in stage.facts.items():
            if value not in (None, "", [], {}):
                console.print(
                    Text(f"{'':11}{key:<16}", style="dim") + _plain(value), soft_wrap=True
                )
        console.print(Text(f"{'':11}{'in':<16}", style="dim") + stage.where, soft_wrap=True)
        if stage.problem:
            console.print(Text(f"{'':11}✗ {stage.problem}", style="bold red"), soft_wrap=True)
    return 0 if origin.whole else 1


def lineage(arguments: argparse.Namespace, console: Console) -> None:
    """Print a run's OpenLineage events, or send them."""
    from lepton.pipeline.lineage import lineage_of, send

    found = lineage_of(load_run(arguments.run_name, arguments.home), arguments.home)
    if arguments.openlineage is None:
        return _say(console, "\n".join(json.dumps(e) for e in events(found)))
    sent = send(found, arguments.openlineage)
    return _say(console, f"{sent} events to {arguments.openlineage}")


def runs(arguments: argparse.Namespace, console: Console) -> None:
    """Print the runs of a home."""
    rows = listing.runs(arguments.home)
    if arguments.json:
        return _say(console, json.dumps(rows, indent=1))
    columns = ("run", "status", "steps", "loss", "workers", "replayed", "goodput", "forecast")
    shown = Table(*columns, "when", "table")
    for row in rows:
        if row["problem"]:
            _add(shown, row["run"], f"unreadable: {row['problem']}")
            continue
        _add(
            shown,
            row["run"],
            row["status"],
            f"{row['steps']} of {row['planned']}",
            "" if row["loss"] is None else f"{row['loss']:.4f}",
            " → ".join(str(n) for n in row["workers"]),
            str(row["replayed"]),
            "" if row["goodput"] is None else f"{row['goodput']:.1%}",
            _off(row["forecast"]),
            _minute(row["last_step"] or row["began"]),
            "\n".join(row["tables"]),
        )
    return _show(shown, console)


def _off(outcome: Mapping[str, float] | None) -> str:
    """How long a run was to take, and how much longer (+) or shorter (-) it took."""
    return "" if outcome is None else f"{outcome['predicted']:.1f} s {outcome['off']:+.1%}"


def models(arguments: argparse.Namespace, console: Console) -> None:
    """Print the model versions of a home, after changing what was to be changed of one."""
    if arguments.changes:
        change_version(arguments)
    at = datetime.fromisoformat(arguments.at) if arguments.at else None
    rows = listing.models(arguments.home, arguments.model, at)
    if arguments.json:
        return _say(console, json.dumps(rows, indent=1))
    shown = Table("model", "version", "role", "metrics", "run", "table", "created", "said of it")
    for row in rows:
        share = "" if row["share"] is None else f" {row['share']:.0%}"
        _add(
            shown,
            row["model"],
            str(row["version"]),
            ", ".join([r + (share if r in TRIALS else "") for r in row["roles"]] + row["aliases"]),
            "\n".join(f"{k} {v:.4f}" for k, v in row["metrics"].items()),
            f"{row['run']} step {row['step']}",
            "\n".join(t.rpartition("/")[2] for t in row["tables"]),
            _minute(row["created"]),
            "\n".join(_said(row)),
        )
    return _show(shown, console)


def _said(row: Mapping[str, Any]) -> list[str]:
    tags = [f"{name}={value}" for name, value in row["tags"].items()]
    return [
        *(["protected"] if row["protected"] else []),
        *tags,
        *([row["note"]] if row["note"] else []),
    ]


def _add(table: Table, *cells: str) -> None:
    """Add a row of plain text: a name in brackets is no markup."""
    table.add_row(*(Text(cell) for cell in cells))


def _show(table: Table, console: Console) -> None:
    """Print a table; one that goes to a file or a pipe keeps its lines whole."""
    if not console.is_terminal:
        console.width = max(console.width, PIPE_WIDTH)
    console.print(table)


def _minute(moment: str) -> str:
    return moment[:16].replace("T", " ")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(v) for v in value)
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _say(console: Console, text: str) -> None:
    """Print as it is, so that a program can read it."""
    console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


def _text(line: Line) -> Text:
    text = Text(f"{line.when:>11} {line.took:>9}  ", style="dim")
    text.append(line.branch)
    text.append(line.name, style="not dim")
    if line.trouble:
        text.append(f"  ✗ {line.trouble}", style="not dim bold red")
    return text.append(f"  {line.facts}")


def _neighbours(found: Found) -> list[str]:
    """A line for each other trace that this one is linked with."""
    lines: list[str] = []
    for what, spans in (("linked from", found.linking), ("links to", found.linked)):
        for trace_id in dict.fromkeys(s.trace_id for s in spans):
            names = sorted({s.name for s in spans if s.trace_id == trace_id})
            lines.append(f"{what} trace {trace_id}: {', '.join(names)}")
    return lines


def _page(found: Found) -> TracePage:
    run = found.run
    facts: dict[str, str] = {}
    if run is not None:
        losses = run.losses
        facts = {
            "table": str(json.loads((Path(run.folder) / "run.json").read_text())["table"]),
            "steps": f"{len(losses)}, {run.replayed} made again",
            "last loss": f"{losses[-1]:.4f}" if losses else "",
            "checkpoints": _checkpoints([c.step for c in run.checkpoints]),
        }
    return TracePage(
        title=f"run {run.name}" if run else f"trace {found.trace_id}",
        trace_id=found.trace_id,
        spans=found.spans,
        linking=found.linking,
        linked=found.linked,
        curves=_curves(found),
        facts=facts | _lost(found),
    )


def _checkpoints(steps: Sequence[int]) -> str:
    """How many, and at which steps: the first ones and the last."""
    shown = [str(step) for step in steps]
    if len(shown) > 2 * FEW:
        shown = [*shown[:FEW], "…", *shown[-FEW:]]
    return (
        f"{len(steps)}, at {'step' if len(steps) == 1 else 'steps'} {', '.join(shown)}"
        if steps
        else ""
    )


def _lost(found: Found) -> dict[str, str]:
    """What killed processes took with them, as a fact of the page."""
    return {"went with killed processes": "; ".join(map(str, found.losses))} if found.losses else {}


def _curves(found: Found) -> dict[str, list[tuple[int, float]]]:
    """Loss and speed of the run over time; of steps made under this trace only."""
    if found.run is None:
        return {}
    first, last = min(s.start_ns for s in found.spans), max(s.end_ns for s in found.spans)
    history = found.run.history()
    times: list[int] = (history["time"].to_numpy().astype("int64") * 1000).tolist()
    losses: list[float] = history["loss"].to_numpy().tolist()
    counts: list[int] = history["rows"].to_numpy().tolist()
    steps = zip(times, losses, counts, strict=True)
    kept = [(at, loss, rows) for at, loss, rows in steps if first <= at <= last]
    return {
        "loss": [(at, loss) for at, loss, _ in kept],
        "rows/s": speed([at for at, _, _ in kept], [rows for _, _, rows in kept]),
    }


def _put(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as e:
        raise LeptonError(f"cannot write {path}: {e.strerror}; name a file in a folder") from e
