"""The registry's state as a fold over its events. Pure.

Invariant: after any prefix of a model's events there is at most one champion, and an event that
would break this is refused before it is committed. Events of a model are numbered 1, 2, 3, …
without gaps, and compare-and-set asks whether one since a number undoes what was decided on. A
version's number is never given again, and what was registered of it never changes; what people say
about it (tags, a note, protection, later measurements) does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from lepton.errors import RegistryError

KINDS = (
    "registered",
    "shadow",
    "canary",
    "paused",
    "promoted",
    "replaced",
    "aborted",
    "rolled_back",
    "withdrawn",
    "aliased",
    "described",
    "measured",
    "deleted",
)
MOVES = frozenset({"shadow", "canary", "paused", "promoted", "aborted", "rolled_back", "withdrawn"})
"""Kinds that move the pointer."""
ROLES = ("champion", "previous", "canary", "shadow")

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
        tags, note: what people say about it; they may change.
        protected: it cannot be deleted.
        measured: ``uri@version`` of the rows judged to the metrics on them.
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
    note: str = ""
    protected: bool = False
    measured: Mapping[str, Mapping[str, float]] = field(
        default_factory=dict[str, Mapping[str, float]]
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Pointer:
    """Who answers; ``seq`` dates it. One version at most is on trial, as canary or as shadow.

    Attributes:
        champion: the version that answers.
        previous: the one before it.
        canary: a version that answers a share of the requests.
        shadow: a version that is asked a share of the requests too, and never answers.
        share: of requests, for the one on trial; 0 while it is paused.
        by: header whose value decides who gets the canary, so that a user stays with a version;
            empty decides by chance.
    """

    champion: int | None = None
    previous: int | None = None
    canary: int | None = None
    shadow: int | None = None
    share: float = 0.0
    by: str = ""
    seq: int = 0

    @property
    def trial(self) -> int | None:
        """The version on trial."""
        return self.shadow if self.canary is None else self.canary


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One entry of the log.

    Attributes:
        seq: 1, 2, 3, … per model.
        kind: one of :data:`KINDS`.
        version: the version it is about; None for ``aborted``, ``rolled_back``, ``withdrawn``
            (a first champion that could not be served), and an alias that is taken away.
        share: of requests, for ``canary`` and ``shadow``.
        details: ``by``, ``rule`` and ``steps`` for a trial; ``alias`` for ``aliased`` (which takes
            it away without a version); ``tags`` (null takes one away), ``note`` and ``protected``,
            each only if it changes, for ``described``; ``table`` and ``metrics`` for ``measured``;
            ``replicas`` (how many), ``surge`` and ``seconds`` for ``replaced``; ``traceparent`` of
            the span under which a trial, a promotion or what ends it happened.
        reason: why, for ``paused``, ``aborted``, ``rolled_back``, ``withdrawn``, ``replaced`` and
            ``deleted``.
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
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])
    actor: str = ""
    trace_id: str = ""
    id: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelState:
    """A model after some events; ``last`` is the highest version number ever given."""

    model: str
    pointer: Pointer = field(default_factory=Pointer)
    aliases: Mapping[str, int] = field(default_factory=dict[str, int])
    versions: Mapping[int, ModelVersion] = field(default_factory=dict[int, ModelVersion])
    last: int = 0


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
    if event.kind not in KINDS:
        raise RegistryError(
            f"event {event.seq} of {state.model!r} is of unknown kind {event.kind!r}"
        )
    if event.kind in _FOLDS:
        return replace(_FOLDS[event.kind](state, event), pointer=replace(pointer, seq=event.seq))
    return replace(state, pointer=replace(_moved(state, event), seq=event.seq))


def undoes(event: Event, kind: str, alias: str = "") -> bool:
    """Return whether an event undoes what a move was decided on, if it comes before that move.

    Moves of the pointer, and of aliases, are decided on the pointer; those of an alias on that
    alias, too. Other kinds are undone by whatever happens to the model.
    """
    if kind not in MOVES and kind != "aliased":
        return True
    same_alias = event.kind == kind == "aliased" and event.details.get("alias") == alias
    return event.kind in MOVES or same_alias


def asked_for_by(events: Sequence[Event], version: int) -> str:
    """Return the traceparent under which a version was last given requests; empty if unknown.

    Args:
        events: of its model, oldest first.
        version: one that the pointer names.
    """
    given = ("shadow", "canary", "promoted")
    for event in reversed(events):
        back = event.kind == "rolled_back"  # to the champion there is now
        if back or (event.kind in given and event.version == version):
            return str(event.details.get("traceparent", ""))
    return ""


def _moved(state: ModelState, event: Event) -> Pointer:
    pointer = state.pointer
    if event.kind in ("canary", "shadow"):
        return _trial(state, event)
    if event.kind == "promoted":
        _known(state, event.version)
        if event.version == pointer.champion:
            raise RegistryError(f"version {event.version} of {state.model!r} is champion already")
        return Pointer(champion=event.version, previous=pointer.champion)
    if event.kind == "rolled_back":
        if pointer.previous is None:
            raise RegistryError(f"model {state.model!r} has no former champion to go back to")
        return Pointer(champion=pointer.previous)
    if event.kind == "withdrawn":
        if pointer.champion is None or {pointer.previous, pointer.trial} != {None}:
            raise RegistryError(f"model {state.model!r} has no first champion to withdraw")
        return Pointer()
    if pointer.trial is None:
        raise RegistryError(f"model {state.model!r} has no canary or shadow to end or to pause")
    if event.kind == "paused":
        return replace(pointer, share=0.0)
    return Pointer(champion=pointer.champion, previous=pointer.previous)


def _aliased(state: ModelState, event: Event) -> ModelState:
    alias = str(event.details.get("alias", ""))
    check_alias(alias)
    if event.version is None:
        if alias not in state.aliases:
            raise RegistryError(
                f"model {state.model!r} has no alias {alias!r}; it has: {sorted(state.aliases)}"
            )
        return replace(state, aliases={a: n for a, n in state.aliases.items() if a != alias})
    _known(state, event.version)
    return replace(state, aliases={**state.aliases, alias: event.version})


def _registered(state: ModelState, event: Event) -> ModelState:
    entry = event.registered
    if entry is None or (entry.model, entry.version) != (state.model, state.last + 1):
        raise RegistryError(f"event {event.seq} of {state.model!r} registers no next version")
    return replace(state, versions={**state.versions, entry.version: entry}, last=entry.version)


def _described(state: ModelState, event: Event) -> ModelState:
    entry = _known(state, event.version)
    told = event.details
    changed = {**entry.tags, **told.get("tags", {})}
    entry = replace(
        entry,
        tags={name: value for name, value in changed.items() if value is not None},
        note=told.get("note", entry.note),
        protected=told.get("protected", entry.protected),
    )
    return replace(state, versions={**state.versions, entry.version: entry})


def _measured(state: ModelState, event: Event) -> ModelState:
    entry = _known(state, event.version)
    table = str(event.details.get("table", ""))
    former = {at: found for at, found in entry.measured.items() if at != table}
    measured = {**former, table: dict(event.details.get("metrics", {}))}  # the newest comes last
    entry = replace(entry, measured=measured)
    return replace(state, versions={**state.versions, entry.version: entry})


def _deleted(state: ModelState, event: Event) -> ModelState:
    entry = _known(state, event.version)
    named = f"version {entry.version} of {state.model!r}"
    if entry.protected:
        raise RegistryError(f"{named} is protected: take the protection away first")
    roles = [role for role in ROLES if getattr(state.pointer, role) == entry.version]
    aliases = sorted(alias for alias, n in state.aliases.items() if n == entry.version)
    if roles or aliases:
        raise RegistryError(
            f"{named} is {' and '.join([*roles, *aliases])}: let another version be that first"
        )
    left = {number: v for number, v in state.versions.items() if number != entry.version}
    return replace(state, versions=left)


def _replaced(state: ModelState, event: Event) -> ModelState:
    _known(state, event.version)
    return state


_FOLDS = {
    "replaced": _replaced,
    "registered": _registered,
    "aliased": _aliased,
    "described": _described,
    "measured": _measured,
    "deleted": _deleted,
}


def _trial(state: ModelState, event: Event) -> Pointer:
    pointer = state.pointer
    _known(state, event.version)
    if event.share is None or not 0 < event.share <= 1:
        raise RegistryError(f"a {event.kind}'s share must be in (0, 1], not {event.share!r}")
    if pointer.champion is None:
        raise RegistryError(
            f"model {state.model!r} has no champion beside which to run a {event.kind}"
        )
    if event.version == pointer.champion:
        raise RegistryError(f"version {event.version} of {state.model!r} is champion already")
    if pointer.trial not in (None, event.version):
        raise RegistryError(
            f"version {pointer.trial} of {state.model!r} is on trial: wait for its end, or end it "
            "by a rollback"
        )
    base = Pointer(champion=pointer.champion, previous=pointer.previous, share=event.share)
    if event.kind == "shadow":
        return replace(base, shadow=event.version)
    return replace(base, canary=event.version, by=str(event.details.get("by", "")))


def _known(state: ModelState, version: int | None) -> ModelVersion:
    if version is None or version not in state.versions:
        raise RegistryError(
            f"model {state.model!r} has no version {version}; it has: {sorted(state.versions)}"
        )
    return state.versions[version]


def check_name(model: str) -> None:
    """Raise ValueError unless ``model`` can name a model."""
    if not _NAME.fullmatch(model):
        raise ValueError(
            f"model name {model!r} must be 1 to 128 letters, digits, '.', '_' or '-', and begin "
            "with a letter or digit"
        )


def check_alias(alias: str) -> None:
    """Raise ValueError unless ``alias`` can name a version."""
    if not _NAME.fullmatch(alias) or alias in ROLES or alias.isdigit():
        raise ValueError(
            f"alias {alias!r} must be letters, digits, '.', '_' or '-', no number, and none of "
            f"{', '.join(ROLES)}, which promotion moves"
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


def check_tags(tags: Mapping[str, Any]) -> dict[str, str | None]:
    """Return tags as they are.

    Raises:
        ValueError: a name is empty, or a value is no string of at most 1,000 characters.
    """
    for name, value in tags.items():
        wrong = value is not None and not (isinstance(value, str) and len(value) <= 1000)
        if not name or wrong:
            raise ValueError(
                f"tag {name!r} must have a name and a text of at most 1000 characters, not "
                f"{value!r}"
            )
    return dict(tags)
