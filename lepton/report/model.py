"""What a page shows. Pure data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """One span of the trace; times are Unix nanoseconds, links are ``traceid:spanid``."""

    name: str
    span_id: str
    parent_id: str | None
    trace_id: str
    start_ns: int
    end_ns: int
    process: str
    status: str = "ok"
    attributes: Mapping[str, object] = field(default_factory=dict[str, object])
    links: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class LossPoint:
    """Mean loss of a step in one life (attempt) of the worker group."""

    step: int
    loss: float
    world_size: int
    attempt: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Something that went wrong after a step."""

    step: int
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A stage of the loop with its figures, as text."""

    name: str
    figures: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One answer: pixels as a grid of 0 to 1, the right label, what was answered, how surely."""

    pixels: Sequence[Sequence[float]]
    label: str
    answer: str
    score: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything on the page."""

    title: str
    subtitle: str
    trace_id: str
    spans: Sequence[Span] = ()
    losses: Sequence[LossPoint] = ()
    faults: Sequence[Fault] = ()
    stages: Sequence[Stage] = ()
    samples: Sequence[Sample] = ()
    confusion: Sequence[Sequence[int]] | None = None
    labels: Sequence[str] = ()
