"""Span files: one JSON line per ended span, one file per process, readable without a server."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import StatusCode


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanRecord:
    """An ended span as it lies in a file. Times are Unix nanoseconds; ids are hex."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str | None
    start_ns: int
    end_ns: int
    process: str
    status: str = "ok"
    attributes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    links: Sequence[str] = ()


class FileExporter(SpanExporter):
    """Appends spans with one write call, so that lines of a killed process stay whole."""

    def __init__(self, directory: str) -> None:
        self._path = Path(directory) / f"{socket.gethostname()}-{os.getpid()}.jsonl"
        self._file: int | None = None

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Write the spans."""
        self.append([_fields(ended) for ended in spans])
        return SpanExportResult.SUCCESS

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write spans given as the fields of :class:`SpanRecord`."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
        option = orjson.OPT_APPEND_NEWLINE
        os.write(self._file, b"".join(orjson.dumps(r, option=option) for r in records))

    def shutdown(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def process_of(resource: Resource) -> str:
    """Return a process's name and id, as records have it."""
    return f"{resource.attributes['lepton.process']} ({resource.attributes['process.pid']})"


def _fields(ended: ReadableSpan) -> dict[str, Any]:
    """The fields of a :class:`SpanRecord`; a dataclass on the way would double the cost."""
    context = ended.get_span_context()
    assert context is not None  # noqa: S101 - the SDK sets it before it exports
    return {
        "name": ended.name,
        "trace_id": f"{context.trace_id:032x}",
        "span_id": f"{context.span_id:016x}",
        "parent_id": f"{ended.parent.span_id:016x}" if ended.parent else None,
        "start_ns": ended.start_time,
        "end_ns": ended.end_time,
        "process": process_of(ended.resource),
        "status": "error" if ended.status.status_code is StatusCode.ERROR else "ok",
        "attributes": dict(ended.attributes or {}),
        "links": [f"{k.context.trace_id:032x}:{k.context.span_id:016x}" for k in ended.links],
    }


def spans_of(directory: str, trace_id: str | None = None) -> list[SpanRecord]:
    """Return the spans kept in a folder, by start time; of one trace, or of all."""
    found: list[SpanRecord] = []
    for path in sorted(Path(directory).glob("*.jsonl")):
        for line in path.read_text().splitlines():
            entry = SpanRecord(**orjson.loads(line))
            if trace_id is None or entry.trace_id == trace_id:
                found.append(entry)
    return sorted(found, key=lambda s: (s.start_ns, s.span_id))
