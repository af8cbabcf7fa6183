"""The registry's state as a fold over its events. Pure.

Invariant: after any prefix of a model's events there is at most one champion, and an event that
would break this is refused before it is committed. Events of a model are numbered 1, 2, 3, …
without gaps; the number of the newest one is what compare-and-set compares.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from lepton.errors import RegistryError

KINDS = ("registered", "canary", "promoted", "aborted", "rolled_back")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelVersion:
    """An immutable version of a model.

    Attributes:
        model, version: its name and number (1, 2, …).
        checkpoint: uri of the checkpoint's manifest. manifest_sha256: the manifest's hash.
        lineage: table uri and version, code version, seed, cursor, run, traceparent, …
        metrics: finite figures, by name.
        signature: inputs and outputs.
        parent: the version that was champion when this one was registered.
        size: bytes of the checkpoint.
        created: UTC. actor: who. trace_id: under which trace.
    """

    model: str
    version: int
    checkpoint: str
    manifest_sha256: str
    lineage: Mapping[str, Any] = field(default_factory=dict[str, Any])
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    signature: Mapping[str, Any] = field(default_factory=dict[str, Any])
    parent: int | None = None
    size: int = 0
    tags: Mapping[str, str] = field(default_factory=dict[str, str])
    created: datetime
    actor: str = ""
    trace_id: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pointer:
    """Who answers: the champion, and a canary with its share of requests. ``seq`` dates it."""

    champion: int | None = None
    previous: int | None = None
    canary: int | None = None
    share: float = 0.0
    seq: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One entry of the log.

    Attributes:
        seq: 1, 2, 3, … per model.
        kind: one of :data:`KINDS`.
        version: the version it is about; None for ``aborted`` and ``rolled_back``.
        share: of requests, for ``canary``.
        reason: why, for ``aborted`` and ``rolled_back``.
        gate: results of the gates that were checked.
        registered: the version, for ``registered``.
        id: random, so that a writer knows its own event again.
    """

    model: str
    seq: int
    time: datetime
    kind: str
    version: int | None = None
    share: float | None = None
    reason: str = ""
    gate: tuple[Mapping[str, Any], ...] = ()
    registered: ModelVersion | None = None
    actor: str = ""
    trace_id: str = ""
    id: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelState:
    """A model after some events."""

    model: str
    pointer: Pointer = field(default_factory=Pointer)
    versions: Mapping[int, ModelVersion] = field(default_factory=dict[int, ModelVersion])


def state_of(model: str, events: Iterable[Event]) -> ModelState:
    """Fold events, in order, into a state."""
    state = ModelState(model=model)
    for event in events:
        state = apply(state, event)
    return state


def apply(state: ModelState, event: Event) -> ModelState:
    """Return the state after one more event.

    Raises:
        RegistryError: the event is not the next one, or not possible in this state.
    """
    pointer = state.pointer
    if event.model != state.model or event.seq != pointer.seq + 1:
        raise RegistryError(
            f"event {event.seq} of model {event.model!r} does not follow event {pointer.seq} of "
            f"model {state.model!r}"
        )
    if event.kind == "registered":
        return _registered(state, event)
    if event.kind == "canary":
        return replace(state, pointer=_canary(state, event))
    if event.kind == "promoted":
        _known(state, event.version)
        if event.version == pointer.champion:
            raise RegistryError(f"version {event.version} of {state.model!r} is champion already")
        moved = Pointer(champion=event.version, previous=pointer.champion, seq=event.seq)
        return replace(state, pointer=moved)
    if event.kind == "aborted":
        if pointer.canary is None:
            raise RegistryError(f"model {state.model!r} has no canary to give up")
        return replace(state, pointer=replace(pointer, canary=None, share=0.0, seq=event.seq))
    if event.kind == "rolled_back":
        if pointer.previous is None:
            raise RegistryError(f"model {state.model!r} has no former champion to go back to")
        return replace(state, pointer=Pointer(champion=pointer.previous, seq=event.seq))
    raise RegistryError(f"event {event.seq} of {state.model!r} is of unknown kind {event.kind!r}")


def _registered(state: ModelState, event: Event) -> ModelState:
    entry = event.registered
    following = max(state.versions, default=0) + 1
    if entry is None or (entry.model, entry.version) != (state.model, following):
        raise RegistryError(f"event {event.seq} of {state.model!r} registers no next version")
    versions = {**state.versions, entry.version: entry}
    return replace(state, versions=versions, pointer=replace(state.pointer, seq=event.seq))


def _canary(state: ModelState, event: Event) -> Pointer:
    pointer = state.pointer
    _known(state, event.version)
    if event.share is None or not 0 < event.share <= 1:
        raise RegistryError(f"a canary's share must be in (0, 1], not {event.share!r}")
    if pointer.champion is None:
        raise RegistryError(f"model {state.model!r} has no champion beside which to run a canary")
    if event.version == pointer.champion:
        raise RegistryError(f"version {event.version} of {state.model!r} is champion already")
    return replace(pointer, canary=event.version, share=event.share, seq=event.seq)


def _known(state: ModelState, version: int | None) -> None:
    if version not in state.versions:
        raise RegistryError(
            f"model {state.model!r} has no version {version}; it has: {sorted(state.versions)}"
        )


def check_name(model: str) -> None:
    """Raise ValueError unless ``model`` can name a model."""
    if not _NAME.fullmatch(model):
        raise ValueError(
            f"model name {model!r} must be 1 to 128 letters, digits, '.', '_' or '-', and begin "
            "with a letter or digit"
        )


def check_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return metrics as floats.

    Raises:
        ValueError: one is not a finite number.
    """
    for name, value in metrics.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise ValueError(f"metric {name!r} must be a finite number, not {value!r}")
    return {name: float(value) for name, value in metrics.items()}
