"""Which spans are recorded: what ``OTEL_TRACES_SAMPLER`` says, and always what must not be missed.

By default everything is, except where the caller's ``traceparent`` says not to. Failures, slow
requests and promotions are recorded whatever was said.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from opentelemetry.context import Context, get_value, set_value
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import Link, SpanContext, SpanKind, TraceState
from opentelemetry.util.types import Attributes

ALWAYS = frozenset(
    {
        "lepton.promote",
        "lepton.gate",
        "lepton.canary",
        "lepton.rollback",
        "lepton.abort",
        "lepton.pause",
        "lepton.train.failure",
    }
)
"""Spans that are recorded whatever the sampler says."""

_KEY = "lepton-always"


def always(context: Context) -> Context:
    """Have spans begun in this context recorded."""
    return set_value(_KEY, True, context)


class Sampling(Sampler):
    """The usual sampler, except for what is always recorded."""

    def __init__(self, usual: Sampler) -> None:
        self._usual = usual

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """Decide about a span that begins."""
        if name in ALWAYS or (parent_context and get_value(_KEY, parent_context)):
            return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes)
        return self._usual.should_sample(
            parent_context, trace_id, name, kind, attributes, links, trace_state
        )

    def get_description(self) -> str:
        """Say what it does."""
        return f"{self._usual.get_description()}, and always what must not be missed"


class Few:
    """Lets through the first of many, then some in each second.

    Args:
        at_once: how many without delay.
        a_second: how many in the long run.
    """

    def __init__(self, at_once: int = 256, a_second: float = 16.0) -> None:
        self._most, self._rate = at_once, a_second
        self._left, self._then = float(at_once), 0.0
        self._passed_over = 0
        self._lock = threading.Lock()

    def take(self, now: float) -> int:
        """Return 0 for one to leave out; else 1, and 1 for each left out since the last such.

        Args:
            now: seconds, of any clock.
        """
        with self._lock:
            gained = max(0.0, now - self._then) * self._rate
            self._left, self._then = min(self._most, self._left + gained), now
            self._passed_over += 1
            if self._left < 1:
                return 0
            self._left -= 1
            found, self._passed_over = self._passed_over, 0
            return found


class Ids(RandomIdGenerator):
    """Random ids, except for a span that gets those it had before it was known to matter."""

    def __init__(self) -> None:
        self._given = threading.local()

    @contextmanager
    def giving(self, context: SpanContext) -> Generator[None]:
        """Give these ids to the span begun in the block."""
        self._given.ids = context
        try:
            yield
        finally:
            self._given.ids = None

    def generate_span_id(self) -> int:
        """Return the id of a span."""
        given: Any = getattr(self._given, "ids", None)
        return given.span_id if given else super().generate_span_id()

    def generate_trace_id(self) -> int:
        """Return the id of a trace."""
        given: Any = getattr(self._given, "ids", None)
        return given.trace_id if given else super().generate_trace_id()


def sampled(provider: TracerProvider) -> TracerProvider:
    """Have a provider sample like this."""
    provider.sampler = Sampling(provider.sampler)
    return provider
