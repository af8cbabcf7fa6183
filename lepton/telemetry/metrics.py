"""Metrics of this process: off unless asked for, then sent by OTLP or scraped, or both.

Whoever measures many things a second gathers them in plain memory and tells of them once a second
(:mod:`lepton.telemetry.pace`). Where metrics are to be scraped, they are given to a *board*: Ray's
endpoint, which Prometheus reads together with Ray's own metrics. Every process that is part of a
Ray finds it by itself, so none that measures is left out; this package never loads Ray.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

from opentelemetry.context import Context
from opentelemetry.sdk.metrics import Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import AggregationTemporality, MetricReader, MetricsData

from lepton.errors import LeptonError
from lepton.telemetry import exporters, settings
from lepton.telemetry.context import resource_of
from lepton.telemetry.delivery import (
    before_flush,
    delivery_of,
    dropped,
    each_second,
    say_what_is_not_offered,
)
from lepton.telemetry.distributions import Distributions
from lepton.telemetry.instruments import INSTRUMENTS, Instrument
from lepton.telemetry.rounds import rounds

EXPORT_S = 10.0
"""Between two collections, unless the environment says otherwise: so much a SIGKILL can take."""

log = logging.getLogger("lepton")

_NONE: Mapping[str, Any] = {}

TraceOf = Callable[[int], str]
"""Returns the traceparent of one of many values, by its place."""


class Board(Protocol):
    """Where metrics are put up to be scraped, such as the module ``ray.util.metrics``."""

    def Counter(self, name: str, description: str, tag_keys: Any) -> Any:  # noqa: N802 - Ray's name
        """Make a counter, which has ``inc(value, tags)``."""
        ...

    def Gauge(self, name: str, description: str, tag_keys: Any) -> Any:  # noqa: N802
        """Make a gauge, which has ``set(value, tags)``."""
        ...

    def Histogram(self, name: str, description: str, boundaries: Any, tag_keys: Any) -> Any:  # noqa: N802
        """Make a histogram, which has ``observe(value, tags)``."""
        ...


class Sink(Protocol):
    """Takes what is measured."""

    def take(self, what: Instrument, value: float, labels: Mapping[str, Any], trace: str) -> None:
        """Take one value."""
        ...

    def take_all(
        self,
        what: Instrument,
        values: Sequence[float],
        labels: Mapping[str, Any],
        trace_of: TraceOf | None,
    ) -> None:
        """Take values of a histogram, which may have traces."""
        ...


class Metered:
    """Takes values for OpenTelemetry, added up until they are collected: once an interval.

    Counters and gauges are the SDK's.
    """

    def __init__(self) -> None:
        self._reader = Collecting()
        provider = MeterProvider(
            metric_readers=[self._reader], resource=resource_of(os.getpid()), shutdown_on_exit=False
        )
        self._meter = provider.get_meter("lepton")
        self._histograms = Distributions(delta=self._reader.delta)
        self._made: dict[str, Callable[..., None]] = {
            name: self._make(i) for name, i in INSTRUMENTS.items() if i.kind != "histogram"
        }
        self._interval_s = settings.number("OTEL_METRIC_EXPORT_INTERVAL", EXPORT_S * 1000) / 1000
        self._next = time.monotonic() + self._interval_s
        self._taken = self._left = 0
        rounds.join(self._look)
        before_flush(self.collect)

    def _make(self, i: Instrument) -> Callable[..., None]:
        if i.kind == "counter":
            return self._meter.create_counter(i.name, i.unit, i.description).add
        return self._meter.create_gauge(i.name, i.unit, i.description).set

    def take(self, what: Instrument, value: float, labels: Mapping[str, Any], trace: str) -> None:
        """Take one value; a sampled trace becomes a histogram's exemplar."""
        self._taken += 1
        if what.kind == "histogram":
            self._histograms.take(what, value, labels, trace)
        else:
            self._made[what.name](value, labels, _NO_CONTEXT)

    def take_all(
        self,
        what: Instrument,
        values: Sequence[float],
        labels: Mapping[str, Any],
        trace_of: TraceOf | None,
    ) -> None:
        """Take values of a histogram."""
        self._taken += 1
        self._histograms.take_all(what, values, labels, trace_of)

    def _look(self, last: bool) -> None:
        """Collect when it is time, or no more comes: Ray may end an idle worker at once."""
        taken, self._taken = self._taken, 0
        quiet = self._left and not taken
        self._left += taken
        if not last and (quiet or time.monotonic() >= self._next):
            self.collect()

    def collect(self) -> None:
        """Let everything wait to be sent."""
        self._left = 0
        self._next = time.monotonic() + self._interval_s
        self._reader.collect()
        found = self._histograms.collect(resource_of(os.getpid()))
        if found is not None:
            delivery_of("metrics").put(found)


class Collecting(MetricReader):
    """Lets what the SDK has added up wait to be sent.

    Attributes:
        delta: whether each collection is to begin anew, as the environment may want it.
    """

    def __init__(self) -> None:
        wish = exporters.metrics()  # which reads it from the environment, as the SDK's reader does
        temporality = wish._preferred_temporality
        super().__init__(
            preferred_temporality=temporality,
            preferred_aggregation=wish._preferred_aggregation,
        )
        self.delta = (temporality or {}).get(Histogram) is AggregationTemporality.DELTA

    def _receive_metrics(
        self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any
    ) -> None:
        delivery_of("metrics").put(metrics_data)

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        """Nothing is held here."""


_NO_CONTEXT = Context()


class Scraped:
    """Puts values on a board."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._made: dict[str, Callable[..., None]] = {}

    def take(self, what: Instrument, value: float, labels: Mapping[str, Any], trace: str) -> None:
        """Take one value."""
        if what.kind == "counter" and value <= 0:
            return  # which Ray's counters refuse
        if what.name not in self._made:
            self._made[what.name] = self._make(what)
        tags = {_plain(key): str(labels.get(key, "")) for key in what.attributes}
        self._made[what.name](value, tags)

    def take_all(
        self,
        what: Instrument,
        values: Sequence[float],
        labels: Mapping[str, Any],
        trace_of: TraceOf | None,
    ) -> None:
        """Put up values one by one: a board knows no other way."""
        for value in values:
            self.take(what, value, labels, "")

    def _make(self, i: Instrument) -> Callable[..., None]:
        name, keys = _plain(i.name), tuple(_plain(key) for key in i.attributes)
        if i.kind == "counter":
            return self._board.Counter(name, i.description, keys).inc
        if i.kind == "gauge":
            return self._board.Gauge(name, i.description, keys).set
        return self._board.Histogram(name, i.description, list(i.bounds), keys).observe


class _State:
    """What this process measures into; None until somebody asks."""

    def __init__(self) -> None:
        self.sinks: list[Sink] | None = None
        self.awaited = False  # a board is: this process may yet become part of a Ray
        self.dropped: Counter[str] = Counter()
        self.lock = threading.Lock()


_state = _State()


def measuring() -> bool:
    """Whether anybody wants metrics of this process."""
    return bool(_sinks())


def measure(
    name: str, value: float, attributes: Mapping[str, Any] = _NONE, *, trace: str = ""
) -> None:
    """Add to a counter, set a gauge or observe a value: whatever :data:`INSTRUMENTS` says.

    It never raises: what goes wrong is said once, and then there is less to see.

    Args:
        name: of an instrument.
        value: in its unit.
        attributes: its labels.
        trace: traceparent of what was measured; becomes an exemplar.
    """
    _tell(name, lambda sink: sink.take(INSTRUMENTS[name], value, attributes, trace))


def measure_all(
    name: str,
    values: Sequence[float],
    attributes: Mapping[str, Any] = _NONE,
    trace_of: TraceOf | None = None,
) -> None:
    """Observe many values at once, for a fifth of the cost. Like :func:`measure`.

    Args:
        name: of a histogram.
        values: in its unit.
        attributes: their labels.
        trace_of: returns the traceparent of a value by its place: it may become an exemplar.
    """
    if len(values):
        _tell(name, lambda sink: sink.take_all(INSTRUMENTS[name], values, attributes, trace_of))


def _tell(name: str, take: Callable[[Sink], None]) -> None:
    for sink in _sinks():
        try:
            take(sink)
        except Exception:
            log.exception("telemetry: cannot measure %s; this process measures no more there", name)
            _state.sinks = [s for s in _state.sinks or [] if s is not sink]


def gather(settle: Callable[[], None]) -> Callable[[], None]:
    """Have measured, every second and at the end, what somebody gathers; return what ends that.

    Args:
        settle: measures what was gathered; called by any thread.
    """
    _sinks()  # before: they are to send what is measured last
    leave = rounds.join(lambda _: settle()), before_flush(settle)

    def end() -> None:
        for one in leave:
            one()

    return end


def watch(
    name: str, read: Callable[[], float | None], attributes: Mapping[str, Any] = _NONE
) -> Callable[[], None]:
    """Read a gauge once a second; None means there is nothing to tell. Return what ends that."""
    if not measuring() and not settings.prometheus():
        return lambda: None

    def tell(_: bool) -> None:
        value = read()
        if value is not None:
            measure(name, value, attributes)

    return rounds.join(tell)


def scrape_by(board: Board) -> None:
    """Put this process's metrics on a board, if they are to be scraped; only the first counts."""
    if not settings.prometheus():
        return
    sinks = _begin()
    with _state.lock:
        _state.awaited = False
        if not any(isinstance(s, Scraped) for s in sinks):
            _state.sinks = [*sinks, Scraped(board)]


def _sinks() -> Sequence[Sink]:
    if _state.sinks is None:
        _begin()
    if _state.awaited and getattr(sys.modules.get("ray"), "is_initialized", bool)():
        found: Any = import_module("ray.util.metrics")
        scrape_by(found)
    return _state.sinks or ()


def _begin() -> list[Sink]:
    with _state.lock:
        if _state.sinks is None:
            _state.sinks = _metered()
            _state.awaited = settings.prometheus()
        return _state.sinks


def _tell_what_was_dropped(_: bool) -> None:
    """Measure what was given up, in a process that measures or is to be scraped."""
    wanted = (_state.sinks is not None or settings.prometheus()) and measuring()
    for signal, count in dropped().items() if wanted else ():
        more = count - _state.dropped[signal]
        if more > 0:
            _state.dropped[signal] = count
            measure("lepton.telemetry.dropped", more, {"lepton.signal": signal})


each_second(_tell_what_was_dropped)


def _metered() -> list[Sink]:
    say_what_is_not_offered()
    if not settings.otlp("metrics"):
        return []
    try:
        return [Metered()]
    except LeptonError as e:
        log.warning("telemetry: metrics are not sent: %s", e)
        return []


def _plain(name: str) -> str:
    return name.replace(".", "_")


os.register_at_fork(after_in_child=_state.__init__)  # a child makes its own
