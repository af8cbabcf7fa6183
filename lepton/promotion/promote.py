"""``lepton.promote``: gate, canary, champion. The registry's pointer is the only thing that moves.

Order of events: the gate is checked, the checkpoint verified; the canary's share is committed and
every replica has loaded the version before its traffic is judged; then one commit makes it the
champion, or one takes it back. Traffic never depends on this process: if it dies, the pointer
stays where it was last committed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lepton import checkpoints, telemetry
from lepton.errors import CheckpointError, GateError, RegistryError, ServingError
from lepton.lake import home_of
from lepton.monitoring import observed
from lepton.promotion.canary import CanaryRule, Observed, decide
from lepton.promotion.gates import Gate, GateResult, check_all, parse
from lepton.registry import ModelState, ModelVersion, Registry
from lepton.serving import App, start
from lepton.serving.app import attach
from lepton.telemetry import Carrier

LOOK_S = 0.25


def promote(
    model: ModelVersion | str,
    version: int | None = None,
    *,
    gate: str | Sequence[str] = (),
    canary: float | None = None,
    rule: CanaryRule | None = None,
    replicas: int | tuple[int, int] = 1,
    port: int | None = None,
    home: str | os.PathLike[str] | None = None,
    trace: Carrier | None = None,
    on_change: Callable[[str], None] | None = None,
) -> App:
    """Make a version the champion and serve it.

    Args:
        model: what :func:`lepton.register` returned, or a model's name with ``version``.
        version: the version number, with a name; default the newest.
        gate: one or more conditions on its metrics, such as ``"accuracy >= 0.9662"`` or
            ``"accuracy >= champion - 0.002"``. All must hold.
        canary: share of requests, in (0, 1), that it gets beside the champion before it takes
            over; None (or no champion yet) promotes at once.
        rule: when the canary is given up or taken over; see
            :class:`lepton.promotion.canary.CanaryRule`.
        replicas: (fewest, most), when the application is not running yet.
        port: for HTTP, when Serve is not running yet.
        home: where the registry is.
        trace: the span to run under.
        on_change: told of each change of traffic in a few words.

    Raises:
        GateError: a condition does not parse, names a missing metric, or does not hold.
        CheckpointError: the checkpoint is damaged. Nothing has changed then.
        ServingError: the canary was rolled back, or replicas could not take the version up; the
            former champion serves on.
        ConflictError: somebody else moved the model meanwhile.
    """
    if canary is not None and not 0 < canary < 1:
        raise ValueError(f"canary={canary!r} must be a share between 0 and 1, such as 0.1")
    gates = [parse(g) for g in ([gate] if isinstance(gate, str) else gate)]
    root = home_of(home)
    registry = Registry(f"{root}/registry")
    chosen = _chosen(registry, model, version)
    parent = trace or Carrier("", f"{root}/traces")
    attributes = {"lepton.model": chosen.model, "lepton.version": chosen.version}
    links = [str(chosen.lineage.get("traceparent", ""))]
    with telemetry.span("lepton.promote", parent, attributes=attributes, links=links) as span:
        state = registry.state(chosen.model)
        with telemetry.span("lepton.gate", span.carrier, attributes=attributes) as gating:
            results = _pass_gates(gates, chosen, _champion(registry, state))
            gating.set(lepton_gate=[r.expression for r in results])
        _verify(chosen)
        move = _Move(registry, chosen, results, span.carrier, on_change or _nobody)
        if state.pointer.champion is None:
            state = move.to_champion(state)
            app = start(chosen.model, root, replicas=replicas, port=port, trace=span.carrier)
            app.wait_for(state.pointer.seq)
            return app
        app = start(chosen.model, root, replicas=replicas, port=port, trace=span.carrier)
        if state.pointer.champion != chosen.version:
            if canary is not None:
                state = move.to_canary(state, canary, app, rule or CanaryRule(), root)
            _take_up(app, registry, move.to_champion(state))
    return app


@dataclass(frozen=True)
class _Move:
    """One version on its way; each step is one commit."""

    registry: Registry
    chosen: ModelVersion
    results: Sequence[GateResult]
    carrier: Carrier
    tell: Callable[[str], None]

    def to_champion(self, state: ModelState) -> ModelState:
        moved = self.registry.promote(
            self.chosen.model,
            self.chosen.version,
            expect=state.pointer.seq,
            gate=self.results,
            trace_id=self.carrier.trace_id,
        )
        self.tell(f"version {self.chosen.version} at 100 %")
        return moved

    def to_canary(
        self, state: ModelState, share: float, app: App, rule: CanaryRule, root: str
    ) -> ModelState:
        moved = self.registry.start_canary(
            self.chosen.model,
            self.chosen.version,
            share,
            expect=state.pointer.seq,
            gate=self.results,
            trace_id=self.carrier.trace_id,
        )
        self.tell(f"version {self.chosen.version} at {share:.0%}")
        with telemetry.span("lepton.canary", self.carrier, attributes={"lepton.share": share}):
            _bake(app, self.registry, moved, rule, root)
        return moved


def rollback(
    model: str,
    *,
    reason: str = "by hand",
    home: str | os.PathLike[str] | None = None,
    trace: Carrier | None = None,
) -> ModelState:
    """Give up a running canary, or else make the former champion the champion again.

    Returns once every replica serves it, where the application runs on the connected cluster.

    Raises:
        RegistryError: there is neither a canary nor a former champion.
    """
    root = home_of(home)
    registry = Registry(f"{root}/registry")
    parent = trace or Carrier("", f"{root}/traces")
    with telemetry.span("lepton.rollback", parent, attributes={"lepton.model": model}):
        pointer = registry.state(model).pointer
        if pointer.canary is not None:
            state = registry.abort_canary(model, expect=pointer.seq, reason=reason)
        else:
            state = registry.rollback(model, expect=pointer.seq, reason=reason)
        try:
            app = attach(model)
        except ServingError:
            return state
        app.wait_for(state.pointer.seq)
    return state


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


def _pass_gates(
    gates: Sequence[Gate], chosen: ModelVersion, champion: ModelVersion | None
) -> list[GateResult]:
    results = check_all(gates, chosen.metrics, champion.metrics if champion else None)
    failed = [r for r in results if not r.passed]
    if failed:
        details = "; ".join(d for r in failed for d in r.details)
        raise GateError(
            f"{chosen.model} version {chosen.version} did not pass its gate: {details}. Nothing "
            "has changed; train it further, or change the gate"
        )
    return results


def _verify(chosen: ModelVersion) -> None:
    """The registered checkpoint must still be the one on disk, whole."""
    manifest = checkpoints.load(chosen.checkpoint)
    if manifest.sha256 != chosen.manifest_sha256:
        raise CheckpointError(
            f"checkpoint {chosen.checkpoint} is not the one registered as {chosen.model} version "
            f"{chosen.version}: its manifest has changed; register it again"
        )
    checkpoints.verify(manifest)


def _bake(app: App, registry: Registry, state: ModelState, rule: CanaryRule, root: str) -> None:
    """Watch the canary's answers until the rule decides.

    Raises:
        ServingError: it was rolled back.
    """
    _take_up(app, registry, state)
    pointer = state.pointer
    began, since_us = time.monotonic(), time.time_ns() // 1000
    while True:
        seen = [
            Observed(requests=c.requests, errors=c.errors, p99_ms=c.p99_ms)
            for c in (
                observed(app.model, pointer.canary or 0, since_us, root),
                observed(app.model, pointer.champion or 0, since_us, root),
            )
        ]
        decision = decide(rule, seen[0], seen[1], time.monotonic() - began)
        if decision.action == "promote":
            return
        if decision.action == "rollback":
            back = registry.abort_canary(app.model, expect=pointer.seq, reason=decision.reason)
            app.wait_for(back.pointer.seq)
            raise ServingError(
                f"{app.model} version {pointer.canary} was rolled back: {decision.reason}; "
                f"version {pointer.champion} serves on"
            )
        time.sleep(LOOK_S)


def _take_up(app: App, registry: Registry, state: ModelState) -> None:
    """Wait until every replica serves the pointer; take it back if one cannot."""
    try:
        app.wait_for(state.pointer.seq)
    except ServingError as e:
        if state.pointer.canary is not None:
            registry.abort_canary(app.model, expect=state.pointer.seq, reason=str(e))
        elif state.pointer.previous is not None:
            registry.rollback(app.model, expect=state.pointer.seq, reason=str(e))
        raise
