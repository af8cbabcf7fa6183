"""A trace as the JSON of Chrome's trace event format, which ui.perfetto.dev opens. Pure.

Times are microseconds since the trace began (``ts`` and ``dur``); Unix nanoseconds of that moment
are in ``otherData``. A process of the trace is a ``pid``, counted from 1, since processes of
several machines may have one number. Events of one ``tid`` lie within each other or apart, as the
format wants it, so spans that overlap otherwise go to further threads of their process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lepton.report.model import Span

Event = dict[str, Any]
STOPS = {"lepton.train.failure": "a worker was lost", "lepton.train.resize": "workers changed"}
"""Spans during which a run made no step, and what had happened."""


def perfetto(
    spans: Sequence[Span],
    trace_id: str,
    counters: Mapping[str, Sequence[tuple[int, float]]] | None = None,
) -> dict[str, Any]:
    """Return the document, to be written as JSON.

    Args:
        spans: of the trace.
        trace_id: of the trace.
        counters: curves by name, as pairs of Unix nanoseconds and a value.
    """
    begin = min((s.start_ns for s in spans), default=0)
    pids = {p: n for n, p in enumerate(dict.fromkeys(s.process for s in _sorted(spans)), 1)}
    events: list[Event] = []
    places: dict[str, tuple[int, int]] = {}
    for process, pid in pids.items():
        events.append(_named("process_name", pid, 0, process))
        threads = threads_of([s for s in spans if s.process == process])
        for tid, thread in enumerate(threads, 1):
            events.append(_named("thread_name", pid, tid, "spans" if tid == 1 else f"more {tid}"))
            places |= {s.span_id: (pid, tid) for s in thread}
            events += [_slice(s, pid, tid, begin) for s in thread]
    events += [e for s in spans if s.name in STOPS for e in _stop(s, places, begin)]
    events += _flows(spans, places, begin)
    for name, points in (counters or {}).items():
        events += [
            {"ph": "C", "name": name, "pid": 0, "ts": _us(t, begin), "args": {"value": v}}
            for t, v in points
        ]
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"trace_id": trace_id, "begin_unix_ns": str(begin)},
    }


def threads_of(spans: Iterable[Span]) -> list[list[Span]]:
    """Spread the spans of a process over as few rows as first fit finds.

    Two spans of a row are apart or one lies within the other.
    """
    threads: list[list[Span]] = []
    open_ends: list[list[int]] = []
    for span in _sorted(spans):
        for thread, ends in zip(threads, open_ends, strict=True):
            while ends and ends[-1] <= span.start_ns:
                ends.pop()
            if not ends or span.end_ns <= ends[-1]:
                thread.append(span)
                ends.append(span.end_ns)
                break
        else:
            threads.append([span])
            open_ends.append([span.end_ns])
    return threads


def _sorted(spans: Iterable[Span]) -> list[Span]:
    return sorted(spans, key=lambda s: (s.start_ns, -s.end_ns, s.span_id))


def _us(at_ns: int, begin: int) -> float:
    return (at_ns - begin) / 1000


def _named(kind: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def _slice(span: Span, pid: int, tid: int, begin: int) -> Event:
    return {
        "ph": "X",
        "name": span.name,
        "cat": "lepton" if span.status == "ok" else "lepton,error",
        "pid": pid,
        "tid": tid,
        "ts": _us(span.start_ns, begin),
        "dur": max(0, span.end_ns - span.start_ns) / 1000,
        "args": {
            "span_id": span.span_id,
            "parent_id": span.parent_id or "",
            "status": span.status,
            **({"links": list(span.links)} if span.links else {}),
            **{key: str(value) for key, value in span.attributes.items()},
        },
    }


def _stop(span: Span, places: Mapping[str, tuple[int, int]], begin: int) -> list[Event]:
    """A mark across all processes."""
    pid, tid = places[span.span_id]
    at = _us(span.start_ns, begin)
    name = STOPS[span.name]
    return [{"ph": "i", "s": "g", "name": name, "pid": pid, "tid": tid, "ts": at, "cat": "lepton"}]


def _flows(spans: Sequence[Span], places: Mapping[str, tuple[int, int]], begin: int) -> list[Event]:
    """An arrow to each span from the one it links to, where that is in this trace."""
    known = {s.span_id: s for s in spans}
    events: list[Event] = []
    pairs = ((known.get(link.rpartition(":")[2]), s) for s in spans for link in s.links)
    for number, (source, target) in enumerate(pairs, 1):
        if source is None:
            continue
        for phase, span, at in (("s", source, source.start_ns), ("f", target, target.start_ns)):
            pid, tid = places[span.span_id]
            events.append(
                {
                    "ph": phase,
                    "id": number,
                    "name": "link",
                    "cat": "link",
                    "pid": pid,
                    "tid": tid,
                    "ts": _us(at, begin),
                    **({"bp": "e"} if phase == "f" else {}),
                }
            )
    return events
