"""A trace by process, over time, with what a run did beneath, on one axis. Pure.

A process has a row for each depth of its spans. Where a run made no step because a worker was lost
or workers changed, a band goes through all rows and through the curves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from lepton.report.model import Span
from lepton.report.perfetto import STOPS, threads_of
from lepton.report.timeline import apart, duration, mark

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 1040, 190, 14, 26, 24
ROW, GAP, CURVE = 14, 10, 110
MOST_NAME, KEPT_END = 29, 20
_KINDS = {
    "lepton.read": "read",
    "lepton.checkpoint": "saved",
    "lepton.request": "asked",
    "lepton.slow_step": "slow",
}
"""Spans of a colour of their own."""
MOST_ROWS = 6
"""A process with more rows of overlapping spans has the rest drawn over the last."""

Points = Sequence[tuple[int, float]]
"""Unix nanoseconds and a value, by time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lane:
    """A process, with its spans by row."""

    name: str
    process: str
    rows: tuple[tuple[Span, ...], ...]


@dataclass(frozen=True, slots=True)
class _Axis:
    begin: int
    total: int

    def x(self, at_ns: int) -> float:
        at_ns = min(max(at_ns, self.begin), self.begin + self.total)
        return LEFT + (WIDTH - LEFT - RIGHT) * (at_ns - self.begin) / self.total


def lanes_of(spans: Sequence[Span]) -> list[Lane]:
    """Return the processes in the order of their first spans, with their ranks in the name."""
    found: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda s: (s.start_ns, s.span_id)):
        found.setdefault(span.process, []).append(span)
    lanes: list[Lane] = []
    for process, own in found.items():
        ranks = sorted({str(s.attributes["lepton.rank"]) for s in own if _ranked(s)})
        name = f"{process}, rank {', '.join(ranks)}" if ranks else process
        lanes.append(Lane(name=name, process=process, rows=tuple(_rows(own))))
    return lanes


def _ranked(span: Span) -> bool:
    return "lepton.rank" in span.attributes


def _rows(spans: Sequence[Span]) -> list[tuple[Span, ...]]:
    """Rows of spans that do not overlap: of each thread, one row a depth."""
    rows: list[tuple[Span, ...]] = []
    for thread in threads_of(spans):
        depths: list[list[Span]] = []
        ends: list[int] = []
        for span in thread:
            while ends and ends[-1] <= span.start_ns:
                ends.pop()
            ends.append(span.end_ns)
            if len(ends) > len(depths):
                depths.append([])
            depths[len(ends) - 1].append(span)
        rows += [tuple(d) for d in depths]
    if len(rows) <= MOST_ROWS:
        return rows
    rest = tuple(s for row in rows[MOST_ROWS - 1 :] for s in row)
    return [*rows[: MOST_ROWS - 1], rest]


def speed(
    times_ns: Sequence[int], rows: Sequence[int], buckets: int = 60
) -> list[tuple[int, float]]:
    """Return rows a second over time: steps are put together until a bucket of time is over.

    A point lies at the end of its bucket; a pause between steps belongs to the step after it.
    """
    if len(times_ns) < 2:
        return []
    width = max(1, (times_ns[-1] - times_ns[0]) // buckets)
    found: list[tuple[int, float]] = []
    since, count = times_ns[0], 0
    for at, number in zip(times_ns[1:], rows[1:], strict=True):
        count += number
        if at - since >= width:
            found.append((at, count / (at - since) * 1e9))
            since, count = at, 0
    return found


def lanes(
    spans: Sequence[Span],
    curves: Mapping[str, Points] | None = None,
    window: tuple[int, int] | None = None,
) -> str:
    """Return the picture as SVG: processes above, curves by name beneath, stops across.

    Args:
        spans: of the trace.
        curves: values over time, by name.
        window: Unix nanoseconds from when until when; default all of the trace.
    """
    shown = [s for s in spans if window is None or _within(s, window)]
    if not shown:
        return "<p>No spans were recorded.</p>"
    axis = _axis(shown, window)
    lost = [(s, process) for s, process in killed(spans) if window is None or _within(s, window)]
    parts: list[str] = []
    y = TOP
    for lane in lanes_of(shown):
        parts.append(_lane(lane, y, axis))
        parts += [_cross(s, y, axis) for s, process in lost if lane.process == process]
        y += len(lane.rows) * ROW + GAP
    for name, points in (curves or {}).items():
        parts.append(_curve(name, points, y, axis))
        y += CURVE + GAP
    parts += [_stop(s, y, axis) for s in shown if s.name in STOPS]
    name = f"Timeline of {len(shown)} spans by process"
    return (
        f'<svg class="chart lanes" viewBox="0 0 {WIDTH} {y + BOTTOM}" role="img" '
        f'aria-label="{name}"><title>{name}</title>{_grid(y, axis)}{"".join(parts)}</svg>'
    )


def _within(span: Span, window: tuple[int, int]) -> bool:
    return span.start_ns <= window[1] and span.end_ns >= window[0]


def _axis(spans: Sequence[Span], window: tuple[int, int] | None) -> _Axis:
    begin = window[0] if window else min(s.start_ns for s in spans)
    end = window[1] if window else max(s.end_ns for s in spans)
    return _Axis(begin, max(1, end - begin))


def _grid(bottom: float, axis: _Axis) -> str:
    marks = [axis.begin + axis.total * i // 8 for i in range(9)]
    return "".join(
        f'<line class="grid" x1="{axis.x(t):.1f}" x2="{axis.x(t):.1f}" y1="{TOP - 6}" y2="{bottom}"/>'
        f'<text class="tick" x="{axis.x(t):.1f}" y="{bottom + 16}" text-anchor="middle">'
        f"{mark((t - axis.begin) / 1e6)}</text>"
        for t in marks[:-1]
    )


def _lane(lane: Lane, top: int, axis: _Axis) -> str:
    bars = "".join(
        _bar(span, top + i * ROW, axis)
        for i, row in enumerate(lane.rows)
        for span in apart(row, axis.total / WIDTH / 2)
    )
    return (
        f'<g class="lane"><text class="who" x="0" y="{top + ROW - 4}">{escape(_short(lane.name))}'
        f"<title>{escape(lane.name)}</title></text>"
        f'<line class="grid" x1="0" x2="{WIDTH}" y1="{top - GAP / 2}" y2="{top - GAP / 2}"/>{bars}</g>'
    )


def _short(name: str) -> str:
    """Shorten a name in the middle: its end, a process id and rank, tells processes apart."""
    if len(name) <= MOST_NAME:
        return name
    return f"{name[: MOST_NAME - KEPT_END - 1]}…{name[-KEPT_END:]}"


def killed(spans: Sequence[Span]) -> list[tuple[Span, str]]:
    """Return who was lost in a failure: a worker with no step after it, where others have some.

    Returns:
        The last window of steps of each such process, and the process.
    """
    last: dict[str, Span] = {}
    for span in sorted((s for s in spans if s.name == "lepton.steps"), key=lambda s: s.end_ns):
        last[span.process] = span
    found: list[tuple[Span, str]] = []
    newest = max((s.end_ns for s in last.values()), default=0)
    failures = [s for s in spans if s.name == "lepton.train.failure"]
    for process, span in last.items():
        began = [f for f in failures if span.start_ns <= f.end_ns and span.end_ns <= f.end_ns]
        first = min(began, key=lambda f: f.end_ns, default=None)
        if first is not None and newest > first.end_ns and _near(span, first, spans):
            found.append((span, process))
    return found


def _near(span: Span, failure: Span, spans: Sequence[Span]) -> bool:
    """Whether no other stop lies between a worker's last steps and a failure."""
    between = range(span.end_ns, failure.start_ns)
    return not any(s.name in STOPS and s is not failure and s.start_ns in between for s in spans)


def _cross(span: Span, top: float, axis: _Axis) -> str:
    """Mark where a process was killed."""
    x, y = axis.x(span.end_ns) + 7, top + ROW / 2 - 1
    told = f"{span.process} was lost here"
    return (
        f'<path class="killed" d="M{x - 4:.1f} {y - 4:.1f} l8 8 m0 -8 l-8 8">'
        f"<title>{escape(told)}</title></path>"
    )


def _bar(span: Span, top: float, axis: _Axis) -> str:
    width = max(1.0, axis.x(span.end_ns) - axis.x(span.start_ns))
    facts = [f"{span.name}  {duration((span.end_ns - span.start_ns) / 1e6)}"]
    facts += [f"{k}: {v}" for k, v in sorted(span.attributes.items())]
    label = span.name.removeprefix("lepton.")
    shown = (
        f'<text class="in" x="{axis.x(span.start_ns) + 3:.1f}" y="{top + ROW - 4}">{escape(label)}</text>'
        if width > 7 * len(label) + 6
        else ""
    )
    kind = f"span {_KINDS.get(span.name, '')}".rstrip() if span.status == "ok" else "span failed"
    return (
        f'<rect class="{kind}" x="{axis.x(span.start_ns):.1f}" y="{top:.1f}" width="{width:.1f}" '
        f'height="{ROW - 2}" rx="2"><title>{escape(chr(10).join(facts))}</title></rect>{shown}'
    )


def _stop(span: Span, bottom: float, axis: _Axis) -> str:
    kind = "loss" if span.status != "ok" else "change"
    x, width = axis.x(span.start_ns), axis.x(span.end_ns) - axis.x(span.start_ns)
    world = span.attributes.get("lepton.world_size", "?")
    told = f"{STOPS[span.name]}: no step for {duration((span.end_ns - span.start_ns) / 1e6)}, then {world} workers"
    return (
        f'<g class="stop {kind}"><rect x="{x:.1f}" y="{TOP - 12}" width="{max(1.5, width):.1f}" '
        f'height="{bottom - TOP + 12:.1f}"><title>{escape(told)}</title></rect>'
        f'<path d="M{x:.1f} {TOP - 6} l-5 -9 h10 z"><title>{escape(told)}</title></path></g>'
    )


def _curve(name: str, points: Points, top: float, axis: _Axis) -> str:
    known = [p for p in points if p[1] == p[1] and abs(p[1]) != float("inf")]
    low, high = min((v for _, v in known), default=0.0), max((v for _, v in known), default=1.0)
    low = min(0.0, low)
    scale = (CURVE - 12) / ((high - low) or 1.0)

    def y(value: float) -> float:
        return top + CURVE - 4 - (value - low) * scale

    path = " ".join(f"{axis.x(t):.1f},{y(v):.1f}" for t, v in known)
    ticks = "".join(
        f'<text class="tick" x="{LEFT - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{_figure(v)}</text>'
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        for v in dict.fromkeys((low, high))
    )
    return (
        f'<g class="curve"><text class="who" x="0" y="{top + 14}">{escape(name)}</text>{ticks}'
        f'<polyline class="line a0" points="{path}"/></g>'
    )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
