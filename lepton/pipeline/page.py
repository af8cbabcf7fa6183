"""Gathers what a demo left in its folder and writes the page about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lepton.report import Fault, LossPoint, Report, Sample, Span, Stage, render
from lepton.telemetry import spans_of
from lepton.training import Run, load_run
from lepton.training.run import Pause
from lepton.training.steps import loss_of

if TYPE_CHECKING:
    from lepton.pipeline.demo import Demo


def write_page(shown: Demo) -> Path:
    """Write ``report.html`` into the demo's folder and return its path."""
    kept = json.loads((shown.out / "demo.json").read_text())
    run = load_run(kept["run"], str(shown.out))
    page = Report(
        title="lepton: from a Delta table to a served model",
        subtitle=f"{shown.figures['table']['table']} → {kept['run']}, written by lepton demo",
        trace_id=shown.trace_id,
        spans=_spans(shown),
        losses=_losses(run),
        faults=_faults(run),
        stages=[Stage(name=name, figures=shown.figures[name]) for name in _order(shown)],
        samples=[_sample(s) for s in kept["samples"]],
        confusion=kept["confusion"],
        labels=[str(i) for i in range(len(kept["confusion"]))],
    )
    path = shown.out / "report.html"
    path.write_text(render(page), encoding="utf-8")
    return path


def _order(shown: Demo) -> list[str]:
    stages = ("table", "train", "evaluate", "register", "promote", "use")
    return [name for name in stages if name in shown.figures]


def _spans(shown: Demo) -> list[Span]:
    return [
        Span(
            name=s.name,
            span_id=s.span_id,
            parent_id=s.parent_id,
            trace_id=s.trace_id,
            start_ns=s.start_ns,
            end_ns=s.end_ns,
            process=s.process,
            status=s.status,
            attributes=s.attributes,
            links=s.links,
        )
        for s in spans_of(str(shown.out / "traces"), shown.trace_id)
    ]


def _losses(run: Run) -> list[LossPoint]:
    return [
        LossPoint(
            step=n, loss=loss_of(parts), world_size=attempt.world_size, attempt=attempt.number
        )
        for attempt, steps in run.attempts
        for n, parts in sorted(steps.items())
    ]


def _faults(run: Run) -> list[Fault]:
    return [Fault(step=pause.step, label=_change(pause)) for pause in run.pauses]


def _change(pause: Pause) -> str:
    if pause.after == pause.before:
        return f"worker killed, replaced in {pause.seconds:.2f} s"
    if pause.after < pause.before:
        return f"worker killed, next step in {pause.seconds:.2f} s"
    return f"worker joined: {pause.after}"


def _sample(kept: dict[str, Any]) -> Sample:
    pixels = np.array(kept["pixels"]).reshape(8, 8) / 16.0
    return Sample(
        pixels=pixels.tolist(),
        label=str(kept["label"]),
        answer=str(kept["answer"]),
        score=float(kept["score"]),
    )
