"""The trace as a timeline: spans nested by parent; many siblings of a name share a row. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil

from lepton.report.model import Span

COLLAPSE = 6
"""From so many siblings of one name on, they share a row."""


DRAWN = 2000
"""How finely bars of one row are told apart, in parts of its width."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A line of the timeline: one span, or a group of like spans."""

    spans: tuple[Span, ...]
    depth: int
    orphan: bool = False

    @property
    def name(self) -> str:
        """The spans' common name."""
        return self.spans[0].name

    @property
    def failed(self) -> int:
        """How many of the spans failed."""
        return sum(s.status != "ok" for s in self.spans)

    @property
    def caption(self) -> str:
        """Duration of one span; count and quantiles of many."""
        times = sorted((s.end_ns - s.start_ns) / 1e6 for s in self.spans)
        if len(times) == 1:
            return duration(times[0])
        return f"{len(times)} spans, p50 {duration(quantile(times, 0.5))}, p99 {duration(quantile(times, 0.99))}"


def quantile(ordered: Sequence[float], q: float) -> float:
    """Return the nearest-rank quantile of ordered values."""
    return ordered[max(0, ceil(q * len(ordered)) - 1)]


def duration(ms: float) -> str:
    """Return milliseconds as a person reads them."""
    if ms >= 1000:
        return f"{ms / 1000:.1f} s"
    return f"{ms:.0f} ms" if ms >= 10 else f"{ms:.1f} ms"


def mark(ms: float) -> str:
    """Return a moment on an axis as a person reads it."""
    return duration(ms) if ms else "0"


def apart(row: Sequence[Span], step_ns: float) -> list[Span]:
    """Leave out spans that end less than a step after one that is drawn; never a failed one.

    They would be drawn over each other; so a page stays small whatever the number of requests.
    """
    kept: list[Span] = []
    reached = float("-inf")
    for span in sorted(row, key=lambda s: (s.start_ns, s.end_ns)):
        if span.end_ns >= reached + step_ns or span.status != "ok":
            kept.append(span)
            reached = max(reached, span.end_ns)
    return kept


def rows_of(spans: Sequence[Span]) -> list[Row]:
    """Arrange spans: parents before children, by start; spans without their parent at the root."""
    known = {s.span_id for s in spans}
    children: dict[str | None, list[Span]] = {}
    for span in sorted(spans, key=lambda s: (s.start_ns, s.span_id)):
        parent = (
            span.parent_id if span.parent_id in known and span.parent_id != span.span_id else None
        )
        children.setdefault(parent, []).append(span)
    rows: list[Row] = []
    seen: set[str] = set()
    _arrange(children, None, 0, rows, seen)
    rest = tuple(s for s in spans if s.span_id not in seen)  # a cycle of parents hangs on nothing
    return rows + [Row(spans=(s,), depth=0, orphan=True) for s in rest]


def _arrange(
    children: Mapping[str | None, Sequence[Span]],
    parent: str | None,
    depth: int,
    rows: list[Row],
    seen: set[str],
) -> None:
    siblings = children.get(parent, ())
    by_name: dict[str, list[Span]] = {}
    for span in siblings:
        by_name.setdefault(span.name, []).append(span)
    for span in siblings:
        alike = by_name[span.name]
        if span.span_id in seen:
            continue
        leaves = [s for s in alike if s.span_id not in children]
        if len(leaves) >= COLLAPSE and span.span_id not in children:
            seen.update(s.span_id for s in leaves)
            rows.append(Row(spans=tuple(leaves), depth=depth, orphan=_orphan(span, parent)))
            continue
        seen.add(span.span_id)
        rows.append(Row(spans=(span,), depth=depth, orphan=_orphan(span, parent)))
        _arrange(children, span.span_id, depth + 1, rows, seen)


def _orphan(span: Span, parent: str | None) -> bool:
    return parent is None and span.parent_id is not None


def timeline(spans: Sequence[Span]) -> str:
    """Return the timeline as HTML."""
    if not spans:
        return "<p>No spans were recorded.</p>"
    begin = min(s.start_ns for s in spans)
    total = max(1, max(s.end_ns for s in spans) - begin)
    body = "".join(_row(row, begin, total) for row in rows_of(spans))
    ticks = "".join(
        f'<span style="left:{100 * i / 8:.2f}%">{mark(total / 1e6 * i / 8)}</span>'
        for i in range(8)
    )
    return (
        f'<div class="trace"><div class="axis"><i></i><div>{ticks}</div><i></i></div>{body}</div>'
    )


def _row(row: Row, begin: int, total: int) -> str:
    bars = "".join(_bar(s, begin, total) for s in apart(row.spans, total / DRAWN))
    flags = ("<em>orphan</em>" if row.orphan else "") + (
        f"<em>{row.failed} failed</em>" if row.failed else ""
    )
    name = row.name.removeprefix("lepton.")
    processes = sorted({s.process for s in row.spans})
    where = processes[0] if len(processes) == 1 else f"{len(processes)} processes"
    caption = escape(row.caption).replace(" ", "&nbsp;").replace(",&nbsp;", ", ")
    return (
        f'<div class="row"><div class="name" style="--depth:{row.depth}"><b>{escape(name)}</b> {flags}'
        f"<small>{escape(where)}</small></div>"
        f'<div class="bars">{bars}</div><small class="took">{caption}</small></div>'
    )


def _bar(span: Span, begin: int, total: int) -> str:
    left = 100 * (span.start_ns - begin) / total
    width = 100 * max(0, span.end_ns - span.start_ns) / total
    facts = [f"{span.name}  {duration((span.end_ns - span.start_ns) / 1e6)}", span.process]
    facts += [f"{k}: {v}" for k, v in sorted(span.attributes.items())]
    facts += [f"link: {link}" for link in span.links]
    kind = "bar" if span.status == "ok" else "bar failed"
    return (
        f'<span class="{kind}" style="left:{left:.3f}%;width:{width:.3f}%" '
        f'title="{escape(chr(10).join(facts))}"></span>'
    )
