"""Span files: one JSON line per ended span, one file per process, readable without a server."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson

from lepton.telemetry import ledger

MOST_BYTES = 2**29
"""Of a span file of requests: then it is put aside, and what was put aside before is deleted."""

LOOK_S = 1.0
"""So often a writer looks whether its file is still there, and how large."""
_MOST_PARTS = 1000
"""Of one write: what Linux takes, and a few less."""
DEEPEST = 32
"""Spans below one another that are looked at, should they be damaged and form a ring."""
UNFINISHED = "lepton.unfinished"
"""Attribute of a span that has begun, until it ends."""

log = logging.getLogger("lepton")

_putting_aside = threading.Lock()


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

    Where it cannot be written, that is said once and nobody else hears of it: what is missing there
    counts as lost. It is tried again with the next spans.

    Args:
        directory: folder of span files.
    """

    def __init__(self, directory: str) -> None:
        self._path = ledger.file_of(directory, "jsonl")
        self._aside = aside_of(self._path)
        self._file: int | None = None
        self._torn = False
        self._failed = False
        self._look = 0.0
        self._large = False

    def append(self, lines: Iterable[bytes]) -> None:
        """Write encoded spans."""
        try:
            self._look_again()
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self._path, os.O_APPEND | os.O_CREAT | os.O_RDWR, 0o644)
                self._torn = _is_torn(self._file)
            content = [b"\n" if self._torn else b"", *lines]
            if len(content) > _MOST_PARTS:
                content = [b"".join(content)]
            written = os.writev(self._file, content)
            self._torn = written < sum(map(len, content))
            if self._torn:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            self._say(e)

    def put_aside(self) -> int:
        """Put the file aside if it is large; return how many lines are gone for that.

        It takes a moment: not for a thread that a caller waits for.
        """
        if self._file is None or not self._large:
            return 0
        with _putting_aside:  # other writers of this process follow
            return 0 if self._was_put_aside(self._file) else self._put_aside()

    def _look_again(self) -> None:
        """Open the file anew if it is gone; every call costs its thread the interpreter's lock."""
        if self._file is None or time.monotonic() < self._look:
            return
        self._look = time.monotonic() + LOOK_S
        if self._was_put_aside(self._file):
            self._close()
        else:
            self._large = os.fstat(self._file).st_size > MOST_BYTES

    def _put_aside(self) -> int:
        gone = 0
        with suppress(FileNotFoundError), self._aside.open("rb") as before:
            gone = sum(1 for _ in before)
        try:
            self._path.replace(self._aside)
        except OSError as e:
            self._say(e)
            return 0
        self._close()
        return gone

    def _was_put_aside(self, file: int) -> bool:
        try:
            return self._path.stat().st_ino != os.fstat(file).st_ino
        except OSError:  # such as that it is gone
            return True

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file, self._large = None, False

    def _say(self, error: OSError) -> None:
        if self._failed:
            return
        self._failed = True
        log.warning(
            "telemetry: spans cannot be written to %s (%s). It is tried again with each of them, "
            "and nothing else fails for it; this is said once. Make room there, or name another "
            "home",
            self._path,
            error,
        )


def aside_of(path: Path) -> Path:
    """Return where a span file is put aside."""
    return path.with_suffix(f".1{path.suffix}")


def _is_torn(file: int) -> bool:
    """Whether a file ends within a line: a killed process with the same id may have left it so."""
    size = os.fstat(file).st_size
    return size > 0 and os.pread(file, 1, size - 1) != b"\n"


def spans_of(
    directory: str, trace_id: str | None = None, *, linking: bool = False
) -> list[SpanRecord]:
    """Return the spans kept in a folder, by start time; of one trace, or of all.

    What is no whole span is left out: a full disk may cut a line. A span that is under way, or
    whose process was killed, lasts until the last that is known of what is below it.

    Args:
        directory: folder of span files.
        trace_id: the trace; None for all.
        linking: spans of other traces with a link to this one, too.
    """
    found: dict[str, SpanRecord] = {}
    wanted = trace_id.encode() if trace_id is not None else b""
    for path in sorted(Path(directory).glob("*.jsonl")):
        with path.open("rb") as lines:
            for line in lines:
                if wanted not in line:
                    continue
                with suppress(ValueError, TypeError):
                    entry = SpanRecord(**orjson.loads(line))
                    if trace_id is None or _is_about(entry, trace_id, linking=linking):
                        found[entry.trace_id + entry.span_id] = entry  # the newest state of a span
    if any(UNFINISHED in s.attributes for s in found.values()):
        _prolong(found)
    return sorted(found.values(), key=lambda s: (s.start_ns, s.span_id))


def _prolong(found: dict[str, SpanRecord]) -> None:
    """Let spans without an end last as long as what is below them, by trace and span id."""
    for entry in list(found.values()):
        end_ns, above = entry.end_ns, entry
        for _ in range(DEEPEST):
            above = found.get(f"{above.trace_id}{above.parent_id}")
            if above is None:
                break
            if UNFINISHED in above.attributes and above.end_ns < end_ns:
                found[above.trace_id + above.span_id] = replace(above, end_ns=end_ns)


def _is_about(entry: SpanRecord, trace_id: str, *, linking: bool) -> bool:
    if entry.trace_id == trace_id:
        return True
    return linking and any(link.startswith(trace_id) for link in entry.links)
