"""``lepton.promote``: gate, canary, champion. The registry's pointer is the only thing that moves.

Order of events: the gate is checked, the checkpoint verified; the canary's share is committed and
every replica has loaded the version before its traffic is judged; then one commit makes it the
champion, or one takes it back. Traffic never depends on this process: if it dies, the pointer
stays where it was last committed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

from lepton import checkpoints, telemetry
from lepton.errors import RegistryError, ServingError
from lepton.lake import home_of
from lepton.promotion.canary import CanaryRule
from lepton.promotion.judging import GateLike, gates_of, judge
from lepton.promotion.replacing import Turns
from lepton.promotion.trial import Move, Plan, take_up, told_of
from lepton.registry import ModelState, ModelVersion, Registry
from lepton.registry.events import check_alias
from lepton.serving import App, Service, start
from lepton.serving.app import DOWN, UP, attach, standing
from lepton.serving.score import registered
from lepton.telemetry import Carrier


def promote(  # noqa: PLR0913 - the one place for what a promotion can be told
    model: ModelVersion | str,
    version: int | None = None,
    *,
    to: str = "champion",
    gate: GateLike | Sequence[GateLike] = (),
    shadow: float | None = None,
    canary: float | Sequence[float] | None = None,
    by: str = "",
    rule: CanaryRule | None = None,
    bake: float | None = None,
    replicas: int | tuple[int, int] = 1,
    port: int | None = None,
    service: Service | None = None,
    home: str | os.PathLike[str] | None = None,
    trace: Carrier | None = None,
    on_change: Callable[[str], None] | None = None,
) -> App:
    """Make a version the champion and serve it.

    Whoever calls this again after it died in the middle carries on: the trial, its rule and when
    it began are in the registry. Where the application does not run, it is started with the new
    version, unless that is to be tried beside the champion first.

    Args:
        model: what :func:`lepton.register` returned, or a model's name with ``version``.
        version: the version number, with a name; default the newest.
        to: ``champion``, or a name of your own such as ``challenger``: it is let mean the version
            once that passed its gate, as by :func:`alias`. No traffic moves and nothing is
            started then; what is returned is no running application.
        gate: one or more conditions on its metrics, such as ``"accuracy >= 0.9662"`` or
            ``"accuracy >= champion - 0.002"``. ``p50_ms``, ``p99_ms`` (of one row) and ``size_mb``
            are measured where they are named. Or functions of a
            :class:`lepton.promotion.Candidate`, your own or ``beats(table, label=...)``,
            ``not_worse(...)`` and ``rows_hold(...)``. All must hold. Figures of different rows are
            compared by ``any_rows("accuracy >= champion")`` only.
        shadow: share of requests, in (0, 1], that it is asked beside the champion, without
            answering, before anything else; None (or no champion yet) leaves that out.
        canary: share of requests, in (0, 1), that it gets beside the champion before it takes
            over; None (or no champion yet) promotes at once. Several, rising, are steps, such as
            ``(0.01, 0.1, 0.5)``: ``rule`` has to hold on each, and each has its time to bake.
        by: request header that decides who gets the canary, such as ``x-user``: the same user
            gets the same version. Requests without it, or no header named: by chance.
        rule: when the canary or shadow is given up or taken over; see
            :class:`lepton.promotion.canary.CanaryRule`.
        bake: seconds that the canary or shadow has to serve before it can take over, in place of
            the rule's ``bake_s``; the rule's patience is as long at least.
        replicas: (fewest, most), when the application is not running yet.
        port: for HTTP, when Serve is not running yet.
        service: more settings of the application, when it is not running yet.
        home: where the registry is.
        trace: the span to run under.
        on_change: told of each change of traffic in a few words.

    Raises:
        GateError: a condition does not parse, names a missing metric, or does not hold.
        CheckpointError: the checkpoint is damaged. Nothing has changed then.
        ServingError: the canary was rolled back, or replicas could not take the version up; the
            former champion serves on. A first version that cannot be served is withdrawn.
        ConflictError: somebody else moved the model meanwhile.
        RegistryError: another version is on trial.
    """
    steps = steps_of(canary)
    if shadow is not None and not 0 < shadow <= 1:
        raise ValueError(f"shadow={shadow!r} must be a share above 0, at most 1")
    plan = Plan(shadow, steps, by, rule, bake)
    if bake is not None:
        if not plan.tries:
            raise ValueError(f"bake={bake!r} is of a canary or a shadow: name its share, too")
        (rule or CanaryRule()).baking(bake)
    if to != "champion":
        if plan.tries:
            raise ValueError(f"to={to!r} moves no traffic: leave canary= and shadow= out")
        named = alias(model, to, version, gate=gate, home=home)
        return App(named.model, "")
    gates = gates_of(gate)
    root = home_of(home)
    registry = Registry(f"{root}/registry")
    chosen = _chosen(registry, model, version)
    parent = trace or Carrier("", f"{root}/traces")
    attributes = {"lepton.model": chosen.model, "lepton.version": chosen.version}
    links = [str(chosen.lineage.get("traceparent", ""))]
    with telemetry.span("lepton.promote", parent, attributes=attributes, links=links) as span:
        state = registry.state(chosen.model)
        with telemetry.span("lepton.gate", span.carrier, attributes=attributes) as gating:
            champion = _champion(registry, state)
            results = judge(gates, chosen, champion)
            gating.set(lepton_gate=[r.expression for r in results])
        _verify(chosen)
        how: dict[str, Any] = {"replicas": replicas, "port": port, "service": service}
        how |= {"trace": span.carrier}
        move = Move(registry, chosen, results, span.carrier, root, on_change or _nobody)
        return _carried_out(move, state, plan, partial(start, chosen.model, root, **how))


def alias(
    model: ModelVersion | str,
    name: str,
    version: int | None = None,
    *,
    gate: GateLike | Sequence[GateLike] = (),
    home: str | os.PathLike[str] | None = None,
) -> ModelVersion:
    """Let a name of your own, such as ``challenger``, mean a version; no traffic moves.

    Args:
        model: what :func:`lepton.register` returned, or a model's name with ``version``.
        name: the alias; it is moved if it means another version so far.
        version: the version number, with a name; default the newest.
        gate: conditions that the version has to pass first, as in :func:`promote`.
        home: where the registry is.

    Raises:
        ValueError: no name for an alias.
        GateError: a condition does not parse, names a missing metric, or does not hold.
        ConflictError: somebody else moved the name, or who is champion, meanwhile.
        RegistryError: there is no such version.
    """
    check_alias(name)
    gates = gates_of(gate)
    registry = Registry(f"{home_of(home)}/registry")
    chosen = _chosen(registry, model, version)
    state = registry.state(chosen.model)
    results = judge(gates, chosen, _champion(registry, state))
    seen = state.pointer.seq
    registry.alias(chosen.model, name, chosen.version, expect=seen, gate=results)
    return chosen


def pause(
    model: str,
    *,
    reason: str = "by hand",
    home: str | os.PathLike[str] | None = None,
    trace: Carrier | None = None,
) -> ModelState:
    """Take the share of the version on trial away for a while; promoting it again goes on.

    Raises:
        RegistryError: no version is on trial.
    """
    with _moving("lepton.pause", model, home, trace) as (registry, under):
        return registry.pause(model, expect=None, reason=reason, **under)


def abort(
    model: str,
    *,
    reason: str = "by hand",
    home: str | os.PathLike[str] | None = None,
    trace: Carrier | None = None,
) -> ModelState:
    """Give up the version on trial; the champion stays, whoever that is.

    The promotion that began the trial ends with the reason.

    Raises:
        RegistryError: no version is on trial.
    """
    with _moving("lepton.abort", model, home, trace) as (registry, under):
        return registry.abort_canary(model, expect=None, reason=reason, **under)


def rollback(
    model: str,
    *,
    reason: str = "by hand",
    home: str | os.PathLike[str] | None = None,
    trace: Carrier | None = None,
) -> ModelState:
    """Give up a running canary or shadow, or else make the former champion the champion again.

    Returns once every replica serves it, where the application runs on the connected cluster.

    Raises:
        RegistryError: there is neither a trial nor a former champion.
    """
    with _moving("lepton.rollback", model, home, trace) as (registry, under):
        pointer = registry.state(model).pointer
        move = registry.rollback if pointer.trial is None else registry.abort_canary
        state = move(model, expect=pointer.seq, reason=reason, **under)
        try:
            app = attach(model)
        except ServingError:
            return state
        Turns(app=app, registry=registry, tell=_nobody).settle(state)
    return state


@contextmanager
def _moving(
    name: str, model: str, home: str | os.PathLike[str] | None, trace: Carrier | None
) -> Generator[tuple[Registry, dict[str, str]]]:
    """Take a version back under a span: yield the registry, and what it is told of the span."""
    root = home_of(home)
    parent = trace or Carrier("", f"{root}/traces")
    with telemetry.span(name, parent, attributes={"lepton.model": model}) as span:
        registry = Registry(f"{root}/registry")
        state = registry.state(model)
        number = state.pointer.trial or state.pointer.champion
        if number is not None:
            span.set(lepton_version=number)
            span.link(str(registry.version(model, number).lineage.get("traceparent", "")))
        yield registry, told_of(span.carrier)


def steps_of(canary: float | Sequence[float] | None) -> tuple[float, ...]:
    """Return the shares that a canary gets, one after another; none where it is left out.

    Raises:
        ValueError: one is no share, or they do not rise.
    """
    if canary is None:
        return ()
    steps = (canary,) if isinstance(canary, int | float) else tuple(canary)
    rising = all(one < other for one, other in pairwise(steps))
    if not steps or not rising or not all(0 < share < 1 for share in steps):
        raise ValueError(
            f"canary={canary!r} must be a share between 0 and 1, such as 0.1, or several that rise"
        )
    return steps


def _carried_out(move: Move, state: ModelState, plan: Plan, begin: Callable[[], App]) -> App:
    """Have a version that passed its gates take over, by way of the trials planned."""
    champion, chosen = state.pointer.champion, move.chosen
    if champion == chosen.version:
        app = begin()
        move.turns(app).finish(state)
        return app
    tried = champion is not None and plan.tries
    former = standing(chosen.model)
    if not tried and former not in UP:
        return move.to_first_champion(state, begin, close=former in DOWN)
    try:
        app = begin()
    except ServingError as e:
        if not tried:
            raise
        raise ServingError(
            f"{e}; {chosen.model} version {chosen.version} cannot be tried beside version "
            f"{champion}: promote it without canary= and shadow=, and that one is not needed"
        ) from e
    if tried:
        state = move.through(state, plan, app)
    if state.pointer.champion != chosen.version:
        take_up(move.turns(app), move.to_champion(state))
    return app


def _nobody(_: str) -> None:
    """Tell nobody."""


def _chosen(registry: Registry, model: ModelVersion | str, version: int | None) -> ModelVersion:
    if isinstance(model, ModelVersion):
        return registry.version(model.model, model.version)
    state = registry.state(model)
    if not state.versions:
        raise RegistryError(f"model {model!r} has no version: register one first")
    return registry.version(model, version if version is not None else max(state.versions))


def _champion(registry: Registry, state: ModelState) -> ModelVersion | None:
    number = state.pointer.champion
    return None if number is None else registry.version(state.model, number)


def _verify(chosen: ModelVersion) -> None:
    """The registered checkpoint must still be the one on disk, whole."""
    checkpoints.verify(registered(chosen))
