"""What happened in a trace, in five lines: for somebody who has ten seconds. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import cast

from lepton.report.model import Span
from lepton.report.timeline import duration, quantile

LONG = (
    *("lepton.table", "lepton.plan", "lepton.train", "lepton.cross_validate", "lepton.tune"),
    *("lepton.evaluate", "lepton.register", "lepton.promote", "lepton.score", "lepton.rollback"),
)
"""Spans that a loop's time is told by; they do not lie within each other, or that is left out."""
MOST = 4
"""Of each kind of thing; the rest is counted."""

_LOSS, _RESIZE, _REQUEST = "lepton.train.failure", "lepton.train.resize", "lepton.request"


def outline(spans: Sequence[Span], serving: Sequence[Span] = ()) -> dict[str, str]:
    """Return what to know first, by what it is about; what did not happen is left out.

    Args:
        spans: of the trace.
        serving: requests of other traces that link to this one.
    """
    if not spans:
        return {}
    begin = min(s.start_ns for s in spans)
    told = {
        "time went to": _where(spans),
        "steps waited": _waited([s for s in spans if s.name == "lepton.steps"]),
        "slow steps": _slow([s for s in spans if s.name == "lepton.slow_step"], begin),
        "workers lost": _lost([s for s in spans if s.name == _LOSS], begin),
        "resized": _resized([s for s in spans if s.name == _RESIZE], begin),
        "served": _served([s for s in (*spans, *serving) if s.name == _REQUEST]),
        "else failed": _failed(spans),
    }
    return {about: text for about, text in told.items() if text}


def _where(spans: Sequence[Span]) -> str:
    whole = max(s.end_ns for s in spans) - min(s.start_ns for s in spans)
    known = {s.span_id: s for s in spans}
    spent: Counter[str] = Counter()
    for span in spans:
        above = known.get(span.parent_id or "")
        if span.name in LONG and (above is None or above.name not in LONG):
            spent[span.name.removeprefix("lepton.")] += span.end_ns - span.start_ns
    asked = [s for s in spans if s.name == _REQUEST]
    if asked:
        spent["requests"] = max(s.end_ns for s in asked) - min(s.start_ns for s in asked)
    parts = [f"{name} {duration(ns / 1e6)}{_share(ns, whole)}" for name, ns in spent.most_common()]
    return _few(parts)


def _waited(steps: Sequence[Span]) -> str:
    waited = 1e9 * sum(_number(s, "lepton.input_wait_s") for s in steps)
    if not waited:
        return ""
    whole = max(1, sum(s.end_ns - s.start_ns for s in steps))
    return f"for batches, {100 * waited / whole:.0f} % of their time"


def _slow(steps: Sequence[Span], begin: int) -> str:
    if not steps:
        return ""
    worst = max(steps, key=lambda s: s.end_ns - s.start_ns)
    at = f"at +{duration((worst.start_ns - begin) / 1e6)}"
    took = duration((worst.end_ns - worst.start_ns) / 1e6)
    number, rank = (worst.attributes.get(f"lepton.{k}", "?") for k in ("step", "rank"))
    return f"{len(steps)}, the slowest {at}: step {number} on rank {rank} took {took}"


def _lost(losses: Sequence[Span], begin: int) -> str:
    if not losses:
        return ""
    again = sum(_number(s, "lepton.steps_replayed") for s in losses)
    made = "step" if again == 1 else "steps"
    return f"{len(losses)}, {_when(losses, begin)}; {f'{again:.0f}' if again else 'no'} {made} made again"


def _resized(changes: Sequence[Span], begin: int) -> str:
    if not changes:
        return ""
    ordered = sorted(changes, key=lambda s: s.start_ns)
    to = " → ".join(str(s.attributes.get("lepton.world_size", "?")) for s in ordered)
    times = "once" if len(changes) == 1 else f"{len(changes)} times"
    return f"{times}, to {to} {'worker' if to == '1' else 'workers'}, {_when(ordered, begin)}"


def _when(stops: Sequence[Span], begin: int) -> str:
    ordered = sorted(stops, key=lambda s: s.start_ns)
    at = [f"+{duration((s.start_ns - begin) / 1e6)}" for s in ordered[:MOST]]
    more = ["…"] if len(ordered) > MOST else []
    pause = duration(sum(s.end_ns - s.start_ns for s in ordered) / 1e6)
    return f"at {', '.join(at + more)}; no step for {pause}" + (
        " in all" if len(ordered) > 1 else ""
    )


def _served(requests: Sequence[Span]) -> str:
    by_version: dict[str, list[Span]] = {}
    for span in requests:
        about = span.attributes
        name = f"{about.get('lepton.model', '?')} version {about.get('lepton.version', '?')}"
        by_version.setdefault(name, []).append(span)
    parts: list[str] = []
    for name, own in by_version.items():
        times = sorted((s.end_ns - s.start_ns) / 1e6 for s in own)
        failed = [s for s in own if s.status != "ok"]
        wrong = f", {len(failed)} failed ({_kinds(failed)})" if failed else ", none failed"
        half, most = duration(quantile(times, 0.5)), duration(quantile(times, 0.99))
        count = "1 request" if len(own) == 1 else f"{len(own)} requests"
        parts.append(f"{count} by {name}: p50 {half}, p99 {most}{wrong}")
    return _few(parts)


def _failed(spans: Iterable[Span]) -> str:
    others = [s for s in spans if s.status != "ok" and s.name not in (_LOSS, _REQUEST)]
    kinds = Counter(f"{s.name.removeprefix('lepton.')} ({_kinds([s])})" for s in others)
    return _few([f"{n} times {kind}" if n > 1 else kind for kind, n in kinds.most_common()])


def _kinds(failed: Sequence[Span]) -> str:
    kinds = Counter(str(s.attributes.get("error.type", "error")) for s in failed)
    return ", ".join(kind for kind, _ in kinds.most_common(MOST))


def _few(parts: Sequence[str]) -> str:
    more = [f"and {len(parts) - MOST} more"] if len(parts) > MOST else []
    return "; ".join([*parts[:MOST], *more])


def _share(part: float, whole: float) -> str:
    return f" ({100 * part / whole:.0f} %)" if whole > 0 else ""


def _number(span: Span, name: str) -> float:
    value = span.attributes.get(name, 0)
    return float(cast("float", value)) if isinstance(value, int | float) else 0.0
