"""Ended spans in bulk, for request paths: microseconds to add, one thread that writes.

A span of the SDK that is started, ended and written at once costs a request tens of microseconds.
Here a request leaves a tuple; a thread encodes these a few times a second (``wire``), writes them
to the process's span file, and hands them to the delivery where OTLP is asked for. What a SIGKILL
can lose is what :data:`EVERY_S` seconds brought.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from opentelemetry.sdk.trace import TracerProvider

from lepton.telemetry import settings
from lepton.telemetry.context import Carrier, encoder_of, process_of
from lepton.telemetry.delivery import before_flush, delivery_of, prepare
from lepton.telemetry.ledger import ledger_of
from lepton.telemetry.store import SpanFile
from lepton.telemetry.wire import Common, Ended

EVERY_S = 0.2
MOST = 20_000
CHUNK = 128
"""Spans that are encoded at once: more would take memory that the kernel has to clear first."""

log = logging.getLogger("lepton")

Told = Callable[[Common, Sequence[Ended], bool], None]


class Spool:
    """Takes ended spans from any thread.

    Args:
        directory: folder of span files, or None for OTLP alone.
        told: is given spans with one common part, and whether they are sampled: to measure by.
    """

    def __init__(self, directory: str | None, told: Told | None = None) -> None:
        prepare()
        self._waiting: deque[Any] = deque()  # tuples like Ended, which are quicker made
        self._unsampled: deque[Any] = deque(maxlen=MOST)
        self._told = told
        self._dropped = 0
        self._file = SpanFile(directory) if directory is not None else None
        self._wanted = not settings.disabled()
        self._count = lambda: None
        if directory is not None and self._wanted:
            self._count = ledger_of(os.getpid(), directory, process_of(os.getpid())).adder()
        self._sampler = (
            TracerProvider(shutdown_on_exit=False).sampler
            if os.environ.get("OTEL_TRACES_SAMPLER")
            else None
        )
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._random = random.Random(os.urandom(16)).getrandbits  # noqa: S311 - ids, not secrets
        encoder_of(os.getpid())  # which cannot be made any more where a process ends
        self._leave = before_flush(self.flush)
        self._thread = threading.Thread(target=self._run, daemon=True, name="lepton-spans")
        self._thread.start()

    def add(
        self,
        name: str,
        parent: Carrier,
        start_ns: int,
        *,
        kind: str = "internal",
        error: str = "",
        links: Sequence[str] = (),
        attributes: Mapping[str, Any] | None = None,
        certain: bool = False,
    ) -> Carrier:
        """Take a span that ends now; return its carrier.

        Args:
            name: a fixed name, with no ids in it.
            parent: where it was asked from, as :func:`carrier_of` gives it; one without a trace
                starts a new one.
            start_ns: Unix nanoseconds.
            kind: internal, server, client, producer or consumer.
            error: the kind of error, or an empty string.
            links: traceparents of related spans of other times, well formed or empty.
            attributes: keys as they are.
            certain: keep it whether or not it is sampled.
        """
        common = Common(name, kind, error, links, attributes or {})
        traceparent = self.leave(common, parent.traceparent, start_ns, certain=certain)
        return Carrier(traceparent, parent.directory, parent.baggage)

    def leave(self, common: Common, above: str, start_ns: int, *, certain: bool = False) -> str:
        """Take a span that ends now, like :meth:`add`, for less; return its traceparent.

        Args:
            common: one and the same for many spans.
            above: traceparent of where it was asked from, well formed; empty starts a trace.
            start_ns: Unix nanoseconds.
            certain: keep it whether or not it is sampled.
        """
        if above:
            trace_id, parent_id, flag = above[3:35], above[36:52], above[54] in _SAMPLED
        else:
            number = self._random(128)
            trace_id, parent_id, flag = f"{number:032x}", "", self._root(number, common.name)
        span_id = f"{self._random(64) or 1:016x}"
        if (flag or certain) and self._wanted:
            if len(self._waiting) < MOST:
                self._count()
                self._waiting.append(
                    (common, trace_id, span_id, parent_id, start_ns, time.time_ns())
                )
            else:
                self._dropped += 1
        elif self._told is not None:
            ended = (common, trace_id, span_id, parent_id, start_ns, time.time_ns())
            self._unsampled.append(ended)
        return f"00-{trace_id}-{span_id}-0{flag:d}"

    def flush(self) -> None:
        """Write what waits; never from a request."""
        with self._writing:
            sent = settings.otlp("traces")
            encode = encoder_of(os.getpid()).encode_alike
            lines: list[bytes] = []
            for common, spans in _alike(self._waiting):
                if self._told is not None:
                    self._told(common, spans, True)
                for at in range(0, len(spans), CHUNK):
                    some = spans[at : at + CHUNK]
                    encoded = encode(some, sent=sent)
                    lines.append(encoded.line)
                    if sent:
                        delivery_of("traces").put_all(encoded.message, len(some))
            if lines and self._file is not None:
                self._file.append(lines)
            if self._told is not None:
                for common, spans in _alike(self._unsampled):
                    self._told(common, spans, False)
            if self._dropped:
                log.warning("%d request spans dropped: more than could be written", self._dropped)
                self._dropped = 0

    def close(self) -> None:
        """Write what waits and stop."""
        self._leave()
        self._stop.set()
        self._thread.join()
        self.flush()

    def _root(self, trace_id: int, name: str) -> bool:
        """Whether a trace that begins here is sampled."""
        if self._sampler is None:
            return True
        return self._sampler.should_sample(None, trace_id, name).decision.is_sampled()

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            self.flush()


_SAMPLED = frozenset("13579bdf")
"""The last digit of flags with the lowest bit set."""


def _alike(waiting: deque[Any]) -> Iterable[tuple[Common, list[Ended]]]:
    """Take what waits, by what spans have in common."""
    found: dict[Common, list[Ended]] = {}
    for _ in range(len(waiting)):
        ended = waiting.popleft()
        found.setdefault(ended[0], []).append(ended)
    return found.items()
