"""Spans as rows of a Delta table, to be asked by SQL; a span is in it once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lepton.errors import LakeError
from lepton.lake import Snapshot, table, write
from lepton.report import Span

KEY = ("trace_id", "span_id")
_TIME = pa.timestamp("us", tz="UTC")
SCHEMA = pa.schema(
    [
        pa.field("name", pa.string()),
        pa.field("trace_id", pa.string()),
        pa.field("span_id", pa.string()),
        pa.field("parent_id", pa.string()),
        pa.field("start", _TIME),
        pa.field("end", _TIME),
        pa.field("duration_ms", pa.float64()),
        pa.field("process", pa.string()),
        pa.field("status", pa.string()),
        pa.field("attributes", pa.string()),
        pa.field("links", pa.list_(pa.string())),
    ]
)
"""``status`` is ok or error, ``attributes`` JSON, ``links`` are ``traceid:spanid``."""


def add_spans(spans: Sequence[Span], uri: str) -> tuple[Snapshot, int]:
    """Add the spans of a trace that a table has not yet, in one commit; make it where it is not.

    Two that do so at once add each span once.

    Returns:
        The table and how many spans were added.

    Raises:
        LakeError: there is another kind of table, or it cannot be written; nothing was.
    """
    rows = pa.Table.from_pylist([_row(s) for s in spans], schema=SCHEMA)
    before = _opened(uri)
    if before is not None:
        _check(before)
        traces = sorted({s.trace_id for s in spans})
        held = before.select(["span_id"]).where(pc.field("trace_id").isin(traces)).to_arrow()
        known = set(held["span_id"].to_pylist())
        rows = rows.filter(pa.array([s.span_id not in known for s in spans], pa.bool_()))
        if not len(rows):
            return before, 0
    return write(rows, uri, mode="merge", key=KEY), len(rows)


def _opened(uri: str) -> Snapshot | None:
    if "://" not in uri and not (Path(uri) / "_delta_log").is_dir():
        return None
    try:
        return table(uri)
    except LakeError:
        if "://" in uri:  # not there, or not to be reached: then writing says so
            return None
        raise


def _check(before: Snapshot) -> None:
    missing = sorted(set(SCHEMA.names) - set(before.schema.names))
    if missing:
        raise LakeError(
            f"{before} is no table of spans: it has no column {', '.join(missing)}; name another "
            "table, or one that is not there yet"
        )


def _row(span: Span) -> dict[str, Any]:
    return {
        "name": span.name,
        "trace_id": span.trace_id,
        "span_id": span.span_id,
        "parent_id": span.parent_id,
        "start": span.start_ns // 1000,
        "end": span.end_ns // 1000,
        "duration_ms": (span.end_ns - span.start_ns) / 1e6,
        "process": span.process,
        "status": span.status,
        "attributes": json.dumps(dict(span.attributes), sort_keys=True, default=str),
        "links": list(span.links),
    }
