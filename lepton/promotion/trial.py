"""A version on its way to champion: each step is one commit, and whoever comes next can carry on.

The registry holds all that a trial needs: its kind, share and rule, and when it began. This
process only looks and decides; when it dies, the trial stands as it is until somebody promotes
that version again (and so carries on), or rolls back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from lepton import telemetry
from lepton.errors import ConflictError, LakeError, ServingError
from lepton.monitoring import differences, observed
from lepton.promotion.canary import CanaryRule, Decision, Observed, decide
from lepton.promotion.gates import GateResult
from lepton.promotion.replacing import Turns
from lepton.registry import Event, ModelState, ModelVersion, Pointer, Registry
from lepton.serving import App
from lepton.telemetry import Carrier

LOOK_S = 0.25
PATIENT = 2.0
"""How many times the champion's 99th percentile of latency a client has to wait for a canary: one
whose time is over earlier has given up, later the canary has failed it."""


@dataclass(frozen=True)
class Trial:
    """What is asked for: the kind (shadow or canary), a share, a header, and a rule.

    ``steps`` are the shares of a canary, of which this is one; ``bake`` replaces the rule's time.
    """

    kind: str
    share: float
    by: str
    rule: CanaryRule | None
    steps: tuple[float, ...] = ()
    bake: float | None = None


@dataclass(frozen=True)
class Plan:
    """The trials that a version goes through: a shadow, then a canary's steps."""

    shadow: float | None
    steps: tuple[float, ...]
    by: str
    rule: CanaryRule | None
    bake: float | None = None

    @property
    def tries(self) -> bool:
        """Whether there are any."""
        return self.shadow is not None or bool(self.steps)


@dataclass(frozen=True)
class Move:
    """One version on its way."""

    registry: Registry
    chosen: ModelVersion
    results: Sequence[GateResult]
    carrier: Carrier
    root: str
    tell: Callable[[str], None]

    def to_champion(self, state: ModelState) -> ModelState:
        """Make it the champion; whoever watches the same trial may have been quicker."""
        model, version = self.chosen.model, self.chosen.version
        under = told_of(self.carrier)
        try:
            moved = self.registry.promote(
                model, version, expect=state.pointer.seq, gate=self.results, **under
            )
        except ConflictError:
            now = self.registry.state(model)
            if state.pointer.trial == version == now.pointer.champion:
                return now
            raise
        self.tell(f"version {self.chosen.version} at 100 %")
        return moved

    def to_first_champion(self, state: ModelState, begin: Callable[[], App], *, close: bool) -> App:
        """Make it the champion, then start the application: no former one has to be loaded.

        Args:
            state: that it was decided on.
            begin: starts the application.
            close: that again where it does not come to serve the version.

        Raises:
            ServingError: it cannot be served; the pointer is where it was.
        """
        moved = self.to_champion(state)
        app: App | None = None
        try:
            app = begin()
            app.wait_for(moved.pointer.seq)
        except Exception as e:
            with suppress(ConflictError):  # somebody else has moved the pointer on
                put_back(self.registry, moved, str(e), self.carrier)
            if app is not None and close:
                app.close()
            raise
        return app

    def through(self, state: ModelState, plan: Plan, app: App) -> ModelState:
        """Run the trials planned, those that are left of them.

        Raises:
            ServingError: it was given up.
        """
        about: dict[str, Any] = {"by": plan.by, "rule": plan.rule, "bake": plan.bake}
        if plan.shadow is not None and state.pointer.canary != self.chosen.version:
            state = self.on_trial(state, Trial("shadow", plan.shadow, **about), app)
        left = tuple(self.steps_left(state, plan.steps))
        for share in left:
            state = self.on_trial(state, Trial("canary", share, steps=left, **about), app)
        return state

    def turns(self, app: App) -> Turns:
        """Return how an application's replicas take it up."""
        return Turns(app=app, registry=self.registry, tell=self.tell, carrier=self.carrier)

    def steps_left(self, state: ModelState, asked: Sequence[float]) -> Sequence[float]:
        """Return the shares that a canary has yet to be given, the one that it has first.

        Who carries on and names one share gets the steps that are recorded.
        """
        if state.pointer.canary != self.chosen.version or not asked:
            return asked
        began = _beginning(self.registry.history(self.chosen.model), self.chosen.version)
        steps = asked if len(asked) > 1 else began.details.get("steps") or asked
        return [share for share in steps if share >= (began.share or 0)] or asked

    def on_trial(self, state: ModelState, trial: Trial, app: App) -> ModelState:
        """Run a trial, or carry on one that is under way, until the rule decides.

        Raises:
            ServingError: it was given up.
        """
        if _is_under_way(state, self.chosen, trial):
            self.tell(f"version {self.chosen.version}: its {trial.kind} goes on")
        else:
            state = self._begin(state, trial)
        about = {**_about(self.chosen), "lepton.share": trial.share}
        links = [_trained(self.chosen)]
        with telemetry.span("lepton.canary", self.carrier, attributes=about, links=links):
            take_up(self.turns(app), state)
            return self._watch(app)

    def _begin(self, state: ModelState, trial: Trial) -> ModelState:
        start = self.registry.start_canary
        known = state.pointer.by if state.pointer.trial == self.chosen.version else ""
        more: dict[str, Any] = {"by": trial.by or known, "steps": trial.steps}
        if trial.kind == "shadow":
            start, more = self.registry.start_shadow, {}
        rule = trial.rule or self._known_rule(state)
        if trial.bake is not None:
            rule = rule.baking(trial.bake)
        moved = start(
            self.chosen.model,
            self.chosen.version,
            trial.share,
            expect=state.pointer.seq,
            gate=self.results,
            rule=asdict(rule),
            **told_of(self.carrier),
            **more,
        )
        word = "shadow of" if trial.kind == "shadow" else ""
        self.tell(f"version {self.chosen.version} at {word} {trial.share:.0%}".replace("  ", " "))
        return moved

    def _known_rule(self, state: ModelState) -> CanaryRule:
        """The rule of the trial that is carried on, if there is one."""
        if state.pointer.trial != self.chosen.version:
            return CanaryRule()
        began = _beginning(self.registry.history(self.chosen.model), self.chosen.version)
        return CanaryRule(**began.details.get("rule", {}))

    def _watch(self, app: App) -> ModelState:
        """Look at the answers and the registry until one of them decides."""
        model, version = self.chosen.model, self.chosen.version
        while True:
            state = self.registry.state(model)
            pointer = state.pointer
            if pointer.champion == version:
                return state  # somebody else was quicker
            if pointer.trial != version:
                last = self.registry.history(model)[-1]
                raise ServingError(
                    f"the trial of {model} version {version} was ended by {last.actor}: "
                    f"{last.reason or last.kind}"
                )
            if pointer.share > 0:
                decision = self._judge(pointer.champion or 0, pointer.shadow == version)
                if decision.action == "promote":
                    return state
                if decision.action == "rollback":
                    with suppress(ConflictError):  # the pointer has moved: look again
                        self._give_up(app, pointer, decision.reason)
            time.sleep(LOOK_S)

    def _give_up(self, app: App, pointer: Pointer, reason: str) -> None:
        model = self.chosen.model
        with taking_back(self.chosen, self.carrier) as under:
            back = self.registry.abort_canary(model, expect=pointer.seq, reason=reason, **under)
            with suppress(ServingError):  # why it was given up is what matters
                app.wait_for(back.pointer.seq)
        raise ServingError(
            f"{model} version {self.chosen.version} was rolled back: {reason}; version "
            f"{pointer.champion} serves on"
        )

    def _judge(self, champion: int, is_shadow: bool) -> Decision:
        began = _beginning(self.registry.history(self.chosen.model), self.chosen.version)
        rule = CanaryRule(**began.details.get("rule", {}))
        since_us = int(began.time.timestamp() * 1e6)
        elapsed_s = (datetime.now(UTC) - began.time).total_seconds()
        try:
            seen, its, apart = self._seen(champion, since_us, rule, is_shadow)
        except LakeError as e:
            if elapsed_s < rule.patience_s:
                return Decision("wait", f"its answers cannot be read: {e}")
            return Decision("rollback", f"its answers cannot be read: {e}")
        return decide(rule, seen, its, elapsed_s, apart)

    def _seen(
        self, champion: int, since_us: int, rule: CanaryRule, is_shadow: bool
    ) -> tuple[Observed, Observed, float]:
        """What it and the champion did since a time, and how far their answers are apart."""
        model, version = self.chosen.model, self.chosen.version
        its = observed(model, champion, since_us, self.root)
        patient_ms = PATIENT * its.p99_ms  # who waits less might give up the champion's, too
        own = observed(model, version, since_us, self.root, patient_ms=patient_ms)
        apart = 0.0
        if rule.max_difference is not None:
            found = differences(model, (version, champion), since_us, self.root)
            apart = found[1] if is_shadow else found[0]
        return Observed(**asdict(own)), Observed(**asdict(its)), apart


def _is_under_way(state: ModelState, chosen: ModelVersion, trial: Trial) -> bool:
    pointer = state.pointer
    on_trial = pointer.shadow if trial.kind == "shadow" else pointer.canary
    return on_trial == chosen.version and pointer.share == trial.share


def _beginning(history: Sequence[Event], version: int) -> Event:
    """The event that began the trial, or began it anew after a pause."""
    return next(
        e for e in reversed(history) if e.kind in ("canary", "shadow") and e.version == version
    )


def take_up(turns: Turns, state: ModelState) -> None:
    """Wait until every replica serves the pointer; take it back if one cannot.

    Raises:
        ServingError: one cannot; the message says why.
    """
    try:
        turns.settle(state)
    except ServingError as e:
        # why it could not be taken up is what matters; who has moved the pointer meanwhile decides
        with suppress(ServingError, ConflictError):
            turns.settle(put_back(turns.registry, state, str(e), turns.carrier))
        raise


def put_back(registry: Registry, moved: ModelState, reason: str, carrier: Carrier) -> ModelState:
    """Take back what moved the pointer last, without anybody's asking.

    Args:
        registry: where it is.
        moved: as it was moved.
        reason: why it is taken back.
        carrier: of its promotion.

    Raises:
        ConflictError: somebody else has moved it since.
    """
    model, pointer = moved.model, moved.pointer
    back = registry.withdraw if pointer.previous is None else registry.rollback
    tried = pointer.champion
    if pointer.trial is not None:
        back, tried = registry.abort_canary, pointer.trial
    with taking_back(registry.version(model, tried or 0), carrier) as under:
        return back(model, expect=pointer.seq, reason=reason, **under)


@contextmanager
def taking_back(version: ModelVersion, carrier: Carrier) -> Generator[dict[str, str]]:
    """Take a version back, under a span; yield what the registry is told.

    Args:
        version: what is taken back.
        carrier: of its promotion.
    """
    how: dict[str, Any] = {"attributes": _about(version), "links": [_trained(version)]}
    with telemetry.span("lepton.rollback", carrier, **how) as span:
        yield told_of(span.carrier)


def told_of(carrier: Carrier) -> dict[str, str]:
    """Return what the registry is told of the span that moves it."""
    return {"trace_id": carrier.trace_id, "traceparent": carrier.traceparent}


def _about(version: ModelVersion) -> dict[str, Any]:
    return {"lepton.model": version.model, "lepton.version": version.version}


def _trained(version: ModelVersion) -> str:
    """The span that wrote its checkpoint."""
    return str(version.lineage.get("traceparent", ""))
