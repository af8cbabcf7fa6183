"""Finds a trace by what a person has in hand: a run's name, a trace id or a request's id."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from lepton.errors import LeptonError
from lepton.lake import home_of, table
from lepton.report import Span
from lepton.telemetry import Loss, SpanRecord, losses_of, spans_of
from lepton.training import Run, load_run

_TRACE_ID = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A trace.

    Attributes:
        trace_id: its id.
        spans: all of it, by start.
        run: the training run that belongs to it, if one does.
        linking: spans of other traces that link to spans of this one.
        linked: spans of other traces that spans of this one link to.
        losses: what killed processes of this trace took with them.
    """

    trace_id: str
    spans: Sequence[Span]
    run: Run | None = None
    linking: Sequence[Span] = ()
    linked: Sequence[Span] = ()
    losses: Sequence[Loss] = ()


def find_trace(asked: str | None, home: str | None = None) -> Found:
    """Return the trace of a run, of an id, or of a request; by default the newest.

    Raises:
        LeptonError: nothing goes by that name, or no span of it was recorded.
    """
    root = home_of(home)
    run = _run(asked, root)
    if run is not None:
        chosen = run.trace_id
    elif asked is None:
        every = spans_of(f"{root}/traces")
        chosen = every[-1].trace_id if every else ""
    elif _TRACE_ID.fullmatch(asked) and spans_of(f"{root}/traces", asked):
        chosen = asked
    else:
        chosen = _of_request(asked, root)
    near = _near(root, chosen) if chosen else []
    spans = [s for s in near if s.trace_id == chosen]
    if not spans:
        raise LeptonError(_nothing(asked, chosen, root))
    return Found(
        trace_id=chosen,
        spans=spans,
        run=run or _run_of(chosen, root),
        linking=_ends(near, spans),
        linked=_sources(root, spans),
        losses=_losses(f"{root}/traces", chosen, spans),
    )


def _near(root: str, trace_id: str) -> list[Span]:
    """Return the spans of a trace and those that link to it: a home may hold millions of others."""
    return [_shown(s) for s in spans_of(f"{root}/traces", trace_id, linking=True)]


def answer_rows(request_id: str, home: str | None = None) -> list[dict[str, Any]]:
    """Return what the inference logs hold about a request, first row each, without its data.

    A version on trial as a shadow has an entry of its own.
    """
    columns = ["request_id", "time", "model", "version", "variant", "status", "trace_id"]
    found: list[dict[str, Any]] = []
    for log in logs_of(home):
        wanted = (pc.field("request_id") == request_id) & (pc.field("row") == 0)
        rows = table(log).select([*columns, "latency_ms"]).where(wanted).to_arrow().to_pylist()
        found += [{**row, "log": str(log)} for row in rows]
    return sorted(found, key=lambda r: (r["variant"] == "shadow", r["time"]))


def logs_of(home: str | None = None) -> list[Path]:
    """Return the inference logs of a home, one a model."""
    return sorted(p.parent for p in (Path(home_of(home)) / "answers").glob("*/_delta_log"))


def _losses(folder: str, trace_id: str, spans: Sequence[Span]) -> list[Loss]:
    processes = {s.process for s in spans}
    losses = losses_of(folder)
    return [k for k in losses if k.trace_id == trace_id or k.process in processes]


def _run(name: str | None, root: str) -> Run | None:
    if not name or "/" in name or not (Path(root) / "runs" / name / "run.json").is_file():
        return None
    return load_run(name, root)


def _run_of(trace_id: str, root: str) -> Run | None:
    for path in sorted((Path(root) / "runs").glob("*/run.json")):
        if json.loads(path.read_text())["trace_id"] == trace_id:
            return load_run(path.parent.name, root)
    return None


def _of_request(asked: str, root: str) -> str:
    rows = answer_rows(asked, root)
    if not rows:
        raise LeptonError(_nothing(asked, "", root))
    if not rows[0]["trace_id"]:
        raise LeptonError(f"request {asked!r} was answered without a trace: see lepton why {asked}")
    return str(rows[0]["trace_id"])


def _ends(every: Sequence[Span], spans: Sequence[Span]) -> list[Span]:
    here = {f"{s.trace_id}:{s.span_id}" for s in spans}
    trace_id = spans[0].trace_id
    return [s for s in every if s.trace_id != trace_id and not here.isdisjoint(s.links)]


def _sources(root: str, spans: Sequence[Span]) -> list[Span]:
    wanted = {link for s in spans for link in s.links}
    others = sorted({link.partition(":")[0] for link in wanted} - {spans[0].trace_id})
    every = (s for other in others for s in spans_of(f"{root}/traces", other))
    return [_shown(s) for s in every if f"{s.trace_id}:{s.span_id}" in wanted]


def _nothing(asked: str | None, trace_id: str, root: str) -> str:
    if asked is None:
        return f"no spans of any trace in {root}/traces: train or serve with this home first"
    if trace_id:
        return (
            f"{asked!r} belongs to trace {trace_id}, but no span of it is in {root}/traces: it was "
            "not sampled, or its spans were kept elsewhere"
        )
    return (
        f"no spans of {asked}: it is no run, no trace and no answered request of {root}; `lepton "
        "runs` lists the runs, `lepton trace` shows the newest trace, and a request's id is the "
        "`id` in its answer, which the log holds within a second"
    )


def _shown(kept: SpanRecord) -> Span:
    return Span(
        name=kept.name,
        span_id=kept.span_id,
        parent_id=kept.parent_id,
        trace_id=kept.trace_id,
        start_ns=kept.start_ns,
        end_ns=kept.end_ns,
        process=kept.process,
        status=kept.status,
        attributes=kept.attributes,
        links=kept.links,
    )
