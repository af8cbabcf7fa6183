"""Span files: one JSON line per ended span, one file per process, readable without a server."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from lepton.telemetry import ledger


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


class SpanFile:
    """This process's file; one write call appends, so that a killed process leaves whole lines.

    Args:
        directory: folder of span files.
    """

    def __init__(self, directory: str) -> None:
        self._path = ledger.file_of(directory, "jsonl")
        self._file: int | None = None

    def append(self, lines: Iterable[bytes]) -> None:
        """Write encoded spans."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
        os.write(self._file, b"".join(lines))


def spans_of(directory: str, trace_id: str | None = None) -> list[SpanRecord]:
    """Return the spans kept in a folder, by start time; of one trace, or of all."""
    found: dict[str, SpanRecord] = {}
    for path in sorted(Path(directory).glob("*.jsonl")):
        for line in path.read_text().splitlines():
            entry = SpanRecord(**orjson.loads(line))
            if trace_id is None or entry.trace_id == trace_id:
                found[entry.trace_id + entry.span_id] = entry  # the newest state of a span
    return sorted(found.values(), key=lambda s: (s.start_ns, s.span_id))
