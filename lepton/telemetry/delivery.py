"""Sending to a collector: a bounded queue and a thread for each signal, so no caller ever waits.

A collector that is down, slow or wrong is said once. What it does not take is tried again; when the
queue is full the oldest goes. What was given up is counted, measured and said at the end. Ends are
a call of :func:`flush`, the interpreter's exit and SIGTERM (where nothing else answers to it).
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from lepton.telemetry import exporters, ledger, settings
from lepton.telemetry.exporters import Exporter
from lepton.telemetry.rounds import Call, rounds
from lepton.telemetry.settings import Signal

DELAY_S = 0.2
"""What is lost by SIGKILL at the most, if the collector answers."""
BATCH = 1024
"""Of spans and log records; twice OpenTelemetry's: half as many requests, each with its costs."""
TRIES = 5
PAUSE_S = 1.0
"""Between two tries, beside the exporter's own pauses."""
END_S = 2.0
"""How long the end of a process may be held up."""

log = logging.getLogger("lepton")


class Delivery:
    """What waits to be sent, and the thread that sends it.

    Args:
        what: the signal, for messages and threads' names.
        make: makes the exporter; called in the thread unless :meth:`prepare` was.
        most: items that wait at the most.
        batch: items sent at once; one at a time if 1.

    Attributes:
        dropped: items given up.
        batch: as given, and no more than may wait.
    """

    def __init__(
        self, what: Signal, make: Callable[[], Exporter], *, most: int, batch: int, delay_s: float
    ) -> None:
        self.what: Signal = what
        self.dropped = 0
        self._make, self._most, self._delay_s = make, most, delay_s
        self.batch = batch if batch == 1 else max(2, min(batch, most))
        self._exporter: Exporter | None = None
        self._waiting: deque[tuple[Any, int]] = deque()
        self._count = 0
        self._sending = 0
        self._changed = threading.Condition()
        self._awake, self._hurry = threading.Event(), threading.Event()
        self._said: set[str] = set()
        self._told = 0
        threading.Thread(target=self._run, name=exporters.THREAD + what, daemon=True).start()

    def prepare(self) -> None:
        """Make the exporter now: loading it holds up all threads for some 20 ms, once."""
        with suppress(Exception):  # the thread will say what is wrong
            self._exporter = self._exporter or self._make()

    def put(self, item: Any) -> None:
        """Let an item wait to be sent."""
        self.put_all(item, 1)

    def put_all(self, items: Any, count: int) -> None:
        """Let items wait that are sent as one."""
        with self._changed:
            if not self._waiting:
                self._changed.notify_all()
            self._waiting.append((items, count))
            self._count += count
            while self._count > self._most:
                gone = self._waiting.popleft()[1]
                self._count -= gone
                self.dropped += gone
            enough = self._count >= self.batch
        if enough:
            self._awake.set()

    def hurry(self) -> None:
        """Begin to send what waits, without pauses."""
        with self._changed:
            self._hurry.set()
            self._awake.set()

    def flush(self, timeout_s: float) -> bool:
        """Send what waits; return whether that went well in the time given."""
        self.hurry()
        with self._changed:
            done = self._changed.wait_for(lambda: not (self._waiting or self._sending), timeout_s)
            lost = self.dropped + self._count + self._sending
        if lost > self._told * _AGAIN[self.what]:
            log.warning(
                "telemetry: %d %s have not been taken by %s",
                lost,
                _NOUNS[self.what],
                settings.endpoint(self.what),
                extra={"about": self.what},
            )
            self._told = lost
        return done and lost == 0

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
            self._awake.wait(self._delay_s)
            self._awake.clear()
            while batch := self._take():
                self._deliver(batch)

    def _take(self) -> list[Any]:
        with self._changed:
            batch: list[Any] = []
            self._sending = 0
            while self._waiting and self._sending < self.batch:
                items, count = self._waiting.popleft()
                batch.append(items)
                self._sending += count
            self._count -= self._sending
            if not batch:
                self._hurry.clear()
            self._changed.notify_all()
            return batch

    def _deliver(self, batch: Sequence[Any]) -> None:
        for _ in range(TRIES):
            reason = self._try(batch)
            heard = exporters.answered.get(self.what) or exporters.Answered()
            if reason is None:
                self._taken(heard)
                return
            self._say(
                "telemetry: %s cannot be sent to %s (%s). It is tried again, %d wait at the most, "
                "and nothing else waits for it; this is said once. The collector must run there "
                "and take OTLP over HTTP",
                reason,
                self._most,
            )
            if heard.useless:
                break
            self._hurry.wait(max(PAUSE_S, heard.wait_s))
        with self._changed:
            self.dropped += self._sending

    def _taken(self, heard: exporters.Answered) -> None:
        """Count what a collector took, and what it did not."""
        rejected = min(self._sending, max(0, heard.rejected))
        if self.what == "traces":
            ledger.took(self._sending - rejected)
        if heard.rejected > 0:
            with self._changed:
                self.dropped += rejected
            self._say(
                "telemetry: some %s are rejected by %s (%s), %d at first. What is rejected is not "
                "sent again, but counted; this is said once",
                heard.why or "it does not say why",
                rejected,
            )

    def _try(self, batch: Sequence[Any]) -> str | None:
        """Send; return why it could not be, or None."""
        exporters.reasons.pop(self.what, None)
        exporters.answered.pop(self.what, None)
        try:
            self._exporter = self._exporter or self._make()
            result = self._exporter.export(batch[0] if self.batch == 1 else batch)
        except Exception as e:  # noqa: BLE001 - whatever an exporter raises is a reason
            return f"{type(e).__name__}: {e}"
        if result.name == "SUCCESS":
            return None
        reason = exporters.reasons.get(self.what, "no reason given")
        heard = exporters.answered.get(self.what)
        if heard is None or "max retries" not in reason:
            return reason
        return f"{reason} The last time: {heard.error}"

    def _say(self, text: str, reason: str, number: int) -> None:
        if text not in self._said:
            self._said.add(text)
            told = (_NOUNS[self.what], settings.endpoint(self.what), reason, number)
            log.warning(text, *told, extra={"about": self.what})


_AGAIN = {"traces": 1, "metrics": 2, "logs": 2}
"""So many times as many must be lost to be said anew: each flush has figures and says things."""
_NOUNS = {"traces": "spans", "metrics": "collections of metrics", "logs": "log records"}
_deliveries: dict[Signal, Delivery] = {}
_making = threading.RLock()


def delivery_of(what: Signal) -> Delivery:
    """Return this process's delivery of a signal."""
    with _making:
        if what not in _deliveries:
            look_after_ends()
            _begin_rounds()
            prefix = "OTEL_BLRP_" if what == "logs" else "OTEL_BSP_"
            batch = int(settings.number(prefix + "MAX_EXPORT_BATCH_SIZE", BATCH))
            _deliveries[what] = Delivery(
                what,
                _MAKERS[what],
                most=16
                if what == "metrics"
                else int(settings.number(prefix + "MAX_QUEUE_SIZE", 2048)),
                batch=1 if what == "metrics" else max(2, batch),
                delay_s=settings.number(prefix + "SCHEDULE_DELAY", DELAY_S * 1000) / 1000,
            )
        return _deliveries[what]


def each_second(call: Call) -> None:
    """Have something done every second in each process that sends or gives up anything."""
    _each_second.append(call)


def _begin_rounds() -> None:
    with _making:
        if "rounds" not in _looking:
            _looking.add("rounds")
            for call in _each_second:
                rounds.join(call)


_each_second: list[Call] = []


def say_what_is_not_offered() -> None:
    """Say once in a process what it was asked for in vain; nothing fails for it."""
    for variable, names in settings.OFFERED.items():
        wrong = [] if settings.disabled() else settings.not_offered(variable)
        if wrong and variable not in _complained:
            _complained.add(variable)
            log.warning(
                "telemetry: %s names %s, which lepton does not offer: nothing is done about it. "
                "There are %s. Spans are kept in files all the same, and `lepton trace` shows them",
                variable,
                ", ".join(wrong),
                ", ".join(names),
            )


_complained: set[str] = set()


def prepare() -> None:
    """Get ready to send what is asked for. Call it where something long begins, before its pace."""
    say_what_is_not_offered()
    for what in _MAKERS:
        if settings.otlp(what):
            delivery_of(what).prepare()


def dropped() -> Mapping[Signal, int]:
    """Return how many items of each signal this process gave up."""
    found = _given_up.copy()
    for what, delivery in list(_deliveries.items()):
        found[what] += delivery.dropped
    return found


def give_up(what: Signal, count: int) -> None:
    """Count items that never came so far as to wait."""
    with _making:
        _given_up[what] += count
    _begin_rounds()


_given_up: Counter[Signal] = Counter()


def flush(timeout_ms: int = int(END_S * 1000)) -> bool:
    """Send what waits in this process, in bounded time; return whether all of it went out.

    Call it where a process ends, never in the hot path.
    """
    end = time.monotonic() + timeout_ms / 1000
    rounds.make(last=True)
    for collect in _collecting[::-1]:  # what was begun later may tell what was there before
        collect()
    waiting = list(_deliveries.values())
    for delivery in waiting:  # all at once: each has its thread
        delivery.hurry()
    done = [d.flush(max(0.0, end - time.monotonic())) for d in waiting]
    return all(done)


_collecting: list[Callable[[], None]] = []


def before_flush(collect: Callable[[], None]) -> Callable[[], None]:
    """Have something done whenever all is sent, after the last figures; return what ends that."""
    look_after_ends()
    _collecting.append(collect)

    def leave() -> None:
        with suppress(ValueError):
            _collecting.remove(collect)

    return leave


def look_after_ends() -> None:
    """Flush when this process ends; SIGTERM too, where nothing else answers to it.

    Only the main thread can see to SIGTERM: until it calls this, others' calls do the rest.
    """
    if "exit" not in _looking:
        _looking.add("exit")
        atexit.register(flush)  # ray.kill and os._exit leave it out
    main = threading.current_thread() is threading.main_thread()
    if main and "sigterm" not in _looking:
        _looking.add("sigterm")
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(*_: Any) -> None:
    """Send what waits, then end as if nobody had listened."""
    thread = threading.Thread(target=flush, daemon=True)  # this one may hold a lock just now
    thread.start()
    thread.join(END_S)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


_MAKERS: dict[Signal, Callable[[], Exporter]] = {
    "traces": exporters.spans,
    "metrics": exporters.metrics,
    "logs": exporters.logs,
}


_looking: set[str] = set()


def _forget() -> None:
    global _making
    _making = threading.RLock()
    _deliveries.clear()
    _collecting.clear()
    _looking.clear()
    _given_up.clear()
    with suppress(ValueError):
        atexit.unregister(flush)


os.register_at_fork(after_in_child=_forget)  # a child makes its own
