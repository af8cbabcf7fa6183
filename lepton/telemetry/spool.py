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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opentelemetry.sdk.trace import TracerProvider

from lepton.telemetry import settings
from lepton.telemetry.context import Carrier, encoder_of, process_of
from lepton.telemetry.delivery import before_flush, delivery_of, prepare
from lepton.telemetry.ledger import ledger_of
from lepton.telemetry.store import SpanFile
from lepton.telemetry.wire import Ended

EVERY_S = 0.2
MOST = 20_000

log = logging.getLogger("lepton")


class Spool:
    """Takes ended spans from any thread.

    Args:
        directory: folder of span files, or None for OTLP alone.
        told: is given all spans in the end, sampled or not, many at a time: to measure by.
    """

    def __init__(
        self, directory: str | None, told: Callable[[Sequence[Ended]], None] | None = None
    ) -> None:
        prepare()
        self._waiting: deque[Ended] = deque()
        self._unsampled: deque[Ended] = deque(maxlen=MOST)
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
        self._random = random.Random(os.urandom(16))  # noqa: S311 - ids, not secrets
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
        above = parent.traceparent
        if above:
            trace_id, parent_id, flags = above[3:35], above[36:52], int(above[53:], 16) & 1
        else:
            number = self._random.getrandbits(128)
            trace_id, parent_id, flags = f"{number:032x}", "", self._root(number, name)
        span_id = f"{self._random.getrandbits(64) or 1:016x}"
        sampled = (flags or certain) and self._wanted
        if sampled or self._told is not None:
            times = (start_ns, time.time_ns())
            ids = (trace_id, span_id, parent_id)
            ended = Ended(name, *ids, times, kind, error, links, attributes or {}, bool(sampled))
            if not sampled:
                self._unsampled.append(ended)
            elif len(self._waiting) < MOST:
                self._count()
                self._waiting.append(ended)
            else:
                self._dropped += 1
        traceparent = f"00-{trace_id}-{span_id}-{flags:02x}"
        return Carrier(traceparent, parent.directory, parent.baggage)

    def flush(self) -> None:
        """Write what waits; never from a request."""
        with self._writing:
            spans = [self._waiting.popleft() for _ in range(len(self._waiting))]
            if self._told is not None:
                others = [self._unsampled.popleft() for _ in range(len(self._unsampled))]
                self._told([*spans, *others])
            encode = encoder_of(os.getpid()).encode
            sent = settings.otlp("traces")
            encoded = [encode(span, sent=sent) for span in spans]
            if spans and self._file is not None:
                self._file.append([span.line for span in encoded])
            if spans and sent:
                delivery_of("traces").put(*[span.message for span in encoded])
            if self._dropped:
                log.warning("%d request spans dropped: more than could be written", self._dropped)
                self._dropped = 0

    def close(self) -> None:
        """Write what waits and stop."""
        self._leave()
        self._stop.set()
        self._thread.join()
        self.flush()

    def _root(self, trace_id: int, name: str) -> int:
        """Whether a trace that begins here is sampled, as a flag."""
        if self._sampler is None:
            return 1
        return int(self._sampler.should_sample(None, trace_id, name).decision.is_sampled())

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            self.flush()
