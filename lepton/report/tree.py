"""A trace as lines of text: spans under their parents; like spans share a line. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from lepton.report.model import Span
from lepton.report.timeline import Row, duration, quantile, rows_of

_TOLD = (
    *("run", "table", "model", "version", "variant", "epoch", "step", "steps", "steps_replayed"),
    *("rank", "rows", "world_size", "share", "gate", "accuracy", "f1"),
)
"""Attributes that a line shows, without ``lepton.``, in this order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line of the tree.

    Attributes:
        when: since the trace began. took: how long; of many, the median and the longest.
        branch: the tree's drawing before the name.
        name: of the span, with a count where there are several.
        trouble: what went wrong, or empty.
        facts: process and telling attributes.
    """

    when: str
    took: str
    branch: str
    name: str
    trouble: str
    facts: str

    def __str__(self) -> str:
        """The line without colours."""
        trouble = f"  ✗ {self.trouble}" if self.trouble else ""
        return f"{self.when:>11} {self.took:>9}  {self.branch}{self.name}{trouble}  {self.facts}"


def summary(spans: Sequence[Span]) -> str:
    """Return a trace in a sentence: how many spans and processes, how long, from when."""
    begin, end = min(s.start_ns for s in spans), max(s.end_ns for s in spans)
    failed = sum(s.status != "ok" for s in spans)
    since = datetime.fromtimestamp(begin / 1e9, tz=UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return (
        f"{len(spans)} spans ({failed} failed) of {len({s.process for s in spans})} processes, "
        f"{duration((end - begin) / 1e6)} from {since}"
    )


def tree(spans: Sequence[Span]) -> list[Line]:
    """Return the lines of a trace, parents before children, by start."""
    rows = rows_of(spans)
    begin = min((s.start_ns for s in spans), default=0)
    return [_line(*pair, begin) for pair in zip(rows, _branches(rows), strict=True)]


def _branches(rows: Sequence[Row]) -> list[str]:
    """The drawing before each name; read from the end, a depth goes on if it was seen before."""
    found: list[str] = []
    later: set[int] = set()
    for row in reversed(rows):
        later = {d for d in later if d <= row.depth}
        stems = "".join("│  " if d in later else "   " for d in range(1, row.depth))
        fork = "├─ " if row.depth in later else "└─ "
        found.append(stems + fork if row.depth else "")
        later.add(row.depth)
    return found[::-1]


def _line(row: Row, branch: str, begin: int) -> Line:
    times = sorted((s.end_ns - s.start_ns) / 1e6 for s in row.spans)
    many = len(times) > 1
    processes = sorted({s.process for s in row.spans})
    facts = [processes[0] if len(processes) == 1 else f"{len(processes)} processes"]
    if many:
        facts.insert(0, f"p50 {duration(quantile(times, 0.5))}, max {duration(times[-1])}")
    else:
        facts += _attributes(row.spans[0])
    return Line(
        when=f"+{(row.spans[0].start_ns - begin) / 1e9:.3f} s",
        took="" if many else duration(times[0]),
        branch=branch,
        name=f"{row.name} x{len(times)}" if many else row.name,
        trouble=_trouble(row),
        facts=", ".join(facts),
    )


def _attributes(span: Span) -> list[str]:
    known = {k.removeprefix("lepton."): v for k, v in span.attributes.items()}
    return [f"{k} {_short(known[k])}" for k in _TOLD if k in known]


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _trouble(row: Row) -> str:
    bad = [s for s in row.spans if s.status != "ok"]
    kinds = sorted({str(s.attributes.get("error.type", "failed")) for s in bad})
    parts = [", ".join(kinds)] if bad else []
    if bad and len(row.spans) > 1:
        parts = [f"{len(bad)} failed: {', '.join(kinds)}"]
    if any("lepton.unfinished" in s.attributes for s in row.spans):
        parts.append("not ended")
    return "; ".join(parts + (["its parent was not recorded"] if row.orphan else []))
