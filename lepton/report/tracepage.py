"""A trace as one self-contained page: by process over time, as a tree, and what it is linked with.

Pure; everything that comes from outside is escaped, and nothing is loaded from anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from lepton.report.lanes import Points, killed, lanes
from lepton.report.model import Span
from lepton.report.outline import outline
from lepton.report.page import STYLE
from lepton.report.perfetto import STOPS
from lepton.report.timeline import duration, quantile, timeline
from lepton.report.tree import summary

_STYLE = """
main{max-width:1180px}
.lanes .who{fill:var(--soft);font-size:11px}
.lanes .span{fill:var(--blue);opacity:.75}.lanes .span.failed{fill:var(--red);opacity:1}
.lanes .span.slow{fill:var(--amber)}.lanes .span.read{fill:var(--teal)}.lanes .span.saved{fill:var(--plum)}
.lanes .killed{stroke:var(--red);stroke-width:2.5;fill:none}
section:has(.lanes),section:has(.facts){overflow-x:auto}
@media (max-width:720px){.lanes{min-width:820px}section{padding:14px}
.facts:has(thead){min-width:640px}}
@media (min-width:721px){.row,.axis{grid-template-columns:250px 1fr 230px}.took{white-space:nowrap}}
.lanes .in{fill:#fff;font-size:10px;pointer-events:none}
.stop rect{fill:var(--red);opacity:.22}.stop path{fill:var(--red)}
.stop.change rect,.stop.change path{fill:var(--amber)}
.key{color:var(--soft);font-size:13px;margin:8px 0 0}
.key b{color:var(--red)}.key i{color:var(--amber);font-style:normal}
.key q{color:var(--amber);quotes:none}
.key u{text-decoration:none;color:var(--teal)}.key s{text-decoration:none;color:var(--plum)}
.facts{border-collapse:collapse;font-size:13px;width:100%}
.facts th,.facts td{text-align:left;padding:3px 12px 3px 0;border-top:1px solid var(--rule);
overflow-wrap:anywhere;vertical-align:top;font-weight:400}
.facts th{color:var(--soft)}.facts th[scope=row]{white-space:nowrap;width:1%;padding-right:20px;overflow-wrap:normal}.facts thead th{border:0;font-size:12px}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TracePage:
    """What the page shows.

    Attributes:
        title: of the page.
        trace_id: of the trace.
        spans: of the trace.
        linking: spans of other traces that link to this one: its serving side.
        linked: spans of other traces that this one links to.
        curves: values over time, by name.
        facts: what to say of it, by name.
    """

    title: str
    trace_id: str
    spans: Sequence[Span]
    linking: Sequence[Span] = ()
    linked: Sequence[Span] = ()
    curves: Mapping[str, Points] = field(default_factory=dict[str, Points])
    facts: Mapping[str, str] = field(default_factory=dict[str, str])


def render_trace(page: TracePage) -> str:
    """Return the page as one HTML document."""
    title = escape(page.title)
    told = summary(page.spans) if page.spans else "no spans"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}{_STYLE}</style></head><body><main>"
        f"<header><h1>{title}</h1><p>{escape(told)}</p>"
        f"<p>trace <code>{escape(page.trace_id)}</code></p></header>"
        f"{_facts({**outline(page.spans, page.linking), **page.facts})}"
        f"{_pictures(page)}"
        f"{_stops(page.spans)}"
        f"{_links(page)}"
        f'<section id="tree"><h2>By parent</h2>{timeline(page.spans)}</section>'
        "</main></body></html>"
    )


def _pictures(page: TracePage) -> str:
    """The whole trace; and the time of the curves by itself, where that is a small part of it."""
    window = _window(page)
    key = _key(page.spans)
    if window is None:
        picture = lanes(page.spans, page.curves)
        return f"<section><h2>By process</h2>{picture}{key}</section>"
    return (
        f"<section><h2>By process</h2>{lanes(page.spans)}{key}</section>"
        f"<section><h2>While it trained</h2>{lanes(page.spans, page.curves, window)}</section>"
    )


def _window(page: TracePage) -> tuple[int, int] | None:
    times = [at for points in page.curves.values() for at, _ in points]
    if not times or not page.spans:
        return None
    whole = max(s.end_ns for s in page.spans) - min(s.start_ns for s in page.spans)
    first, last = min(times), max(times)
    margin = max(1, (last - first) // 20)
    return (first - margin, last + margin) if 2 * (last - first) < whole else None


def _facts(facts: Mapping[str, str]) -> str:
    if not facts:
        return ""
    rows = "".join(
        f"<tr><th scope=row>{escape(k)}</th><td>{escape(v)}</td></tr>"
        for k, v in facts.items()
        if v
    )
    return f'<section><table class="facts"><tbody>{rows}</tbody></table></section>'


def _key(spans: Sequence[Span]) -> str:
    names = {s.name for s in spans}
    parts: list[str] = []
    if not names.isdisjoint(STOPS):
        parts += [
            "<b>▼</b> a worker was lost",
            "<i>▼</i> workers came or left; no step was made within the band",
        ]
    parts += ["<b>✕</b> the process that was lost"] if killed(spans) else []
    parts += ["<u>■</u> reads"] if "lepton.read" in names else []
    parts += ["<q>■</q> slow steps"] if "lepton.slow_step" in names else []
    parts += ["<s>■</s> checkpoints"] if "lepton.checkpoint" in names else []
    return f'<p class="key">{" &nbsp; ".join(parts)}</p>' if parts else ""


def _stops(spans: Sequence[Span]) -> str:
    """A table of losses and resizes."""
    found = sorted((s for s in spans if s.name in STOPS), key=lambda s: s.start_ns)
    if not found:
        return ""
    begin = min(s.start_ns for s in spans)
    rows = [
        (
            f"+{duration((s.start_ns - begin) / 1e6)}",
            STOPS[s.name],
            str(s.attributes.get("lepton.step", "")),
            duration((s.end_ns - s.start_ns) / 1e6),
            str(s.attributes.get("lepton.world_size", "")),
            str(s.attributes.get("lepton.steps_replayed", "")),
        )
        for s in found
    ]
    head = ("when", "what", "after step", "no step for", "workers then", "steps made again")
    return f"<section><h2>Losses and resizes</h2>{_table(head, rows)}</section>"


def _links(page: TracePage) -> str:
    """Who links to this trace, such as requests that a checkpoint of it answered, and where to."""
    here = {f"{s.trace_id}:{s.span_id}": s for s in page.spans}
    far = here | {f"{s.trace_id}:{s.span_id}": s for s in page.linked}
    groups: dict[tuple[str, str, str, str], list[Span]] = {}
    for span in (*page.spans, *page.linking):
        for link in span.links:
            target = far.get(link)
            if target is None and span.trace_id != page.trace_id:
                continue
            name = _target(target)
            key = (span.name, span.trace_id, name, link)
            groups.setdefault(key, []).append(span)
    if not groups:
        return ""
    rows = [
        (
            f"{name} ({_who(spans)})",
            _trace(trace, page),
            target,
            link.partition(":")[0],
            _times(spans),
        )
        for (name, trace, target, link), spans in groups.items()
    ]
    shown = [(a, b, f"{c} of {_trace(d, page)}", e) for a, b, c, d, e in rows]
    head = ("from", "in trace", "to", "how many and how long")
    return f'<section id="links"><h2>Linked</h2>{_table(head, shown)}</section>'


def _target(span: Span | None) -> str:
    if span is None:
        return "a span that is not here"
    step = span.attributes.get("lepton.step")
    return span.name if step is None else f"{span.name} at step {step}"


def _trace(trace_id: str, page: TracePage) -> str:
    return "this trace" if trace_id == page.trace_id else f"trace {trace_id}"


def _who(spans: Sequence[Span]) -> str:
    known = {
        f"{s.attributes['lepton.model']} version {s.attributes.get('lepton.version', '?')}"
        for s in spans
        if "lepton.model" in s.attributes
    }
    return ", ".join(sorted(known)) or spans[0].process


def _times(spans: Sequence[Span]) -> str:
    times = sorted((s.end_ns - s.start_ns) / 1e6 for s in spans)
    return f"{len(times)}, p50 {duration(quantile(times, 0.5))}, max {duration(times[-1])}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th scope=col>{escape(h)}</th>" for h in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<table class="facts"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
