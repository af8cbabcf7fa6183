"""Ended spans in bulk, for request paths: microseconds to add, one thread that writes.

A span of the SDK that is started, ended and written at once costs a request tens of microseconds.
Here a request leaves a few values; a thread encodes them a few times a second (``bulk``), writes
them to the process's span file, and hands them to the delivery where OTLP is asked for. What a
SIGKILL can lose is what :data:`EVERY_S` seconds brought.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import repeat
from typing import Any

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ParentBased

from lepton.telemetry import settings
from lepton.telemetry.bulk import FIELDS, MANY, Bulk, Several, apart
from lepton.telemetry.context import Carrier, encoder_of, process_of
from lepton.telemetry.delivery import before_flush, delivery_of, give_up, prepare
from lepton.telemetry.ledger import Ledger, ledger_of
from lepton.telemetry.store import SpanFile
from lepton.telemetry.wire import Common, Encoded

EVERY_S = 0.2
MOST = 20_000
IDS = 2000

log = logging.getLogger("lepton")

Told = Callable[[Several, bool], None]


class Spool:
    """Takes ended spans from any thread.

    Args:
        directory: folder of span files, or None for OTLP alone.
        told: is given spans with one common part, and whether they are sampled: to measure by.
    """

    def __init__(self, directory: str | None, told: Told | None = None) -> None:
        prepare()
        self._waiting: list[Any] = []  # flat: a span leaves nothing for the garbage collector
        self._unsampled: list[Any] = []
        self._told = told
        self._dropped = 0
        self._file = SpanFile(directory) if directory is not None else None
        self._wanted = not settings.disabled()
        self._counters, self._slot, self._numbers = _uncounted()
        self._ledger: Ledger | None = None
        if directory is not None and self._wanted:
            self._ledger = ledger_of(os.getpid(), directory, process_of(os.getpid()))
            self._counters, self._slot, self._numbers = self._ledger.row()
        self._sampler = (
            TracerProvider(shutdown_on_exit=False).sampler
            if os.environ.get("OTEL_TRACES_SAMPLER")
            else None
        )
        judges = self._sampler is not None and not isinstance(self._sampler, ParentBased)
        self._judge = self._sampler if judges else None  # whatever a caller's flag says
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._random = random.Random(os.urandom(16)).getrandbits  # noqa: S311 - ids, not secrets
        self._ids: list[str] = []
        self._think_of_ids()
        self._bulk = Bulk(encoder_of(os.getpid()))  # it cannot be made any more where one ends
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
        traceparent = self.leave(
            common, parent.traceparent, start_ns, time.time_ns(), certain=certain
        )
        return replace(parent, traceparent=traceparent)

    def leave(
        self,
        common: Common,
        above: str,
        start_ns: int,
        end_ns: int,
        *,
        certain: bool = False,
        own: str = "",
    ) -> str:
        """Take a span that is over, like :meth:`add`, for less; return its traceparent.

        Args:
            common: one and the same for many spans.
            above: traceparent of where it was asked from, well formed; empty starts a trace.
            start_ns: Unix nanoseconds.
            end_ns: Unix nanoseconds.
            certain: keep it whether or not it is sampled.
            own: its traceparent by :meth:`begin`, if that was told before.
        """
        traceparent = own or self.begin(common.name, above)
        if (traceparent[-1] == "1" or certain) and self._wanted:
            if len(self._waiting) < MOST * FIELDS:
                self._counters[self._slot] = next(self._numbers)
                self._waiting.extend((common, traceparent, above, start_ns, end_ns))
            else:
                self._dropped += 1
        elif self._told is not None and len(self._unsampled) < MOST * FIELDS:
            self._unsampled.extend((common, traceparent, above, start_ns, end_ns))
        return traceparent

    def begin(self, name: str, above: str) -> str:
        """Return the traceparent of a span that is left later.

        Args:
            name: its name.
            above: as :meth:`leave` takes it.
        """
        try:
            own = self._ids.pop()
        except IndexError:  # more requests than were thought of
            own = f"{self._random(64) or 1:016x}"
        if above:
            flag = above[54] in _SAMPLED if self._judge is None else self._judged(above, name)
            return above[:36] + own + ("-01" if flag else "-00")
        number = self._random(128)
        return f"00-{number:032x}-{own}-0{self._root(number, name):d}"

    def flush(self) -> None:
        """Write what waits; never from a request."""
        with self._writing:
            lines = self._encoded(_taken(self._waiting))
            if lines and self._file is not None:
                self._file.append(lines)
                gone = self._file.put_aside()
                if gone and self._ledger is not None:
                    self._ledger.let_go(gone)
            for some in apart(_taken(self._unsampled)):
                if self._told is not None:
                    self._told(some, False)
            if self._dropped:
                self._count_dropped()

    def _encoded(self, flat: list[Any]) -> list[bytes]:
        """Return spans for the file; let them wait to be sent, if they are to be."""
        sent = settings.otlp("traces")
        found: list[tuple[Encoded, int]] = []
        for some in apart(flat, min(MANY, delivery_of("traces").batch) if sent else MANY):
            try:
                if self._told is not None:
                    self._told(some, True)
                found.append((self._bulk.encode(some, sent=sent), len(some)))
            except Exception:  # such as half a character: the other spans are well
                name = some.common.name
                log.exception("telemetry: spans %r cannot be encoded and are lost", name)
                give_up("traces", len(some))
        if sent:  # now, or what sends them would take turns with this
            for encoded, count in found:
                delivery_of("traces").put_all(encoded.message, count)
        return [encoded.line for encoded, _ in found]

    def _count_dropped(self) -> None:
        dropped, self._dropped = self._dropped, 0
        log.warning("%d request spans dropped: more than could be written", dropped)
        give_up("traces", dropped)
        if self._ledger is not None:
            self._ledger.missed(dropped)

    def close(self) -> None:
        """Write what waits and stop."""
        self._leave()
        self._stop.set()
        self._thread.join()
        self.flush()

    def _judged(self, above: str, name: str) -> bool:
        """Whether a request is sampled, by a sampler that asks nobody else."""
        return self._root(int(above[3:35], 16), name)

    def _root(self, trace_id: int, name: str) -> bool:
        """Whether a trace is sampled by what the environment names."""
        if self._sampler is None:
            return True
        return self._sampler.should_sample(None, trace_id, name).decision.is_sampled()

    def _think_of_ids(self) -> None:
        """Have ids ready: made many at once, they cost a request next to nothing."""
        more = IDS - len(self._ids)
        if more > IDS // 2:
            digits = os.urandom(8 * more).hex()
            self._ids += [digits[at : at + 16] for at in range(0, len(digits), 16)]

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            try:
                self.flush()
            except Exception:  # the next ones may be well
                log.exception("telemetry: some request spans are lost")
            self._think_of_ids()


_SAMPLED = "13579bdf"
"""The last digit of flags with the lowest bit set."""


def _taken(waiting: list[Any]) -> list[Any]:
    """Take what waits, while others may add to it."""
    count = len(waiting)
    found = waiting[:count]
    del waiting[:count]
    return found


def _uncounted() -> tuple[Any, int, Iterator[int]]:
    """Return a counter that nobody reads."""
    return [0], 0, repeat(0)
