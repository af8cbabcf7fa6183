"""The shares that a canary gets one after another, and who carries on."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lepton.errors import ConflictError, GateError, RegistryError, ServingError
from lepton.promotion import CanaryRule, Candidate
from lepton.promotion.canary import Decision
from lepton.promotion.promote import abort, alias, pause, promote, steps_of
from lepton.promotion.replacing import Turns
from lepton.promotion.trial import Move, Trial, take_up
from lepton.registry import Registry
from lepton.serving import App
from lepton.serving.answers import Answer, AnswerLog
from lepton.telemetry import Carrier, SpanRecord, spans_of


@pytest.mark.parametrize(
    ("given", "steps"),
    [(None, ()), (0.1, (0.1,)), ((0.01, 0.1, 0.5), (0.01, 0.1, 0.5)), ([0.2], (0.2,))],
)
def test_shares_are_steps(given: Any, steps: tuple[float, ...]) -> None:
    assert steps_of(given) == steps


@pytest.mark.parametrize("wrong", [0, 1.0, -0.1, (), (0.5, 0.1), (0.1, 0.1), (0.5, 1.0)])
def test_other_shares_are_refused(wrong: Any) -> None:
    with pytest.raises(
        ValueError, match=r"must be a share between 0 and 1, such as 0\.1, or several"
    ):
        steps_of(wrong)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    made = Registry(f"{tmp_path}/registry")
    for _ in range(2):
        made.register("m", checkpoint="c.json", manifest_sha256="s")
    made.promote("m", 1, expect=None)
    return made


def left(registry: Registry, *asked: float) -> list[float]:
    move = Move(registry, registry.version("m", 2), [], Carrier(), "", print)
    return list(move.steps_left(registry.state("m"), asked))


def test_who_carries_on_goes_on_with_the_steps_that_are_recorded(registry: Registry) -> None:
    assert left(registry, 0.1, 0.5) == [0.1, 0.5]
    registry.start_canary("m", 2, 0.2, expect=None, steps=(0.1, 0.2, 0.5))
    assert left(registry, 0.2) == [0.2, 0.5]
    assert left(registry, 0.2, 0.9) == [0.2, 0.9]
    assert left(registry, 0.01, 0.05) == [0.01, 0.05]  # none of these is as far: anew
    assert left(registry) == []
    registry.pause("m", expect=None)
    assert left(registry, 0.2) == [0.2, 0.5]


def test_the_next_step_keeps_header_rule_and_steps_of_the_one_before(registry: Registry) -> None:
    move = Move(registry, registry.version("m", 2), [], Carrier(), "", lambda _: None)
    rule = CanaryRule(bake_s=7)
    first = move._begin(registry.state("m"), Trial("canary", 0.1, "X-User", rule, (0.1, 0.5)))
    second = move._begin(first, Trial("canary", 0.5, "", None, (0.1, 0.5)))
    one, two = registry.history("m")[-2:]
    assert (one.share, two.share) == (0.1, 0.5)
    assert one.details == two.details
    assert one.details["steps"] == [0.1, 0.5]
    assert second.pointer.by == "x-user"


def test_time_to_bake_replaces_that_of_the_rule(registry: Registry) -> None:
    move = Move(registry, registry.version("m", 2), [], Carrier(), "", lambda _: None)
    state = registry.state("m")
    for rule, bake, expected in (
        (None, 2.0, CanaryRule(bake_s=2)),
        (CanaryRule(min_requests=7), 600.0, CanaryRule(min_requests=7, bake_s=600, patience_s=600)),
        (None, None, CanaryRule(min_requests=7, bake_s=600, patience_s=600)),  # as recorded
        (None, 1.0, CanaryRule(min_requests=7, bake_s=1, patience_s=600)),
    ):
        state = move._begin(state, Trial("canary", 0.1, "", rule, bake=bake))
        assert registry.history("m")[-1].details["rule"] == asdict(expected)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"bake": 5.0}, "is of a canary or a shadow"),
        ({"bake": -1.0, "canary": 0.1}, "bake_s must be at least 0"),
        ({"bake": math.nan, "shadow": 0.1}, "bake_s must be at least 0"),
        ({"to": "next", "canary": 0.1}, "moves no traffic"),
        ({"to": "previous"}, "alias 'previous' must be"),
        ({"to": "7"}, "alias '7' must be"),
    ],
)
def test_what_cannot_be_meant_is_refused_first(
    registry: Registry, tmp_path: Path, asked: Any, words: str
) -> None:
    before = registry.state("m")
    with pytest.raises(ValueError, match=words):
        promote("m", 2, home=tmp_path, **asked)
    assert registry.state("m") == before


def test_another_name_is_moved_after_its_gate_and_no_traffic(
    registry: Registry, tmp_path: Path
) -> None:
    entry = registry.register("m", checkpoint="c", manifest_sha256="s", metrics={"f1": 0.5})
    before = registry.state("m").pointer
    with pytest.raises(GateError, match="did not pass"):
        promote(entry, to="challenger", gate="f1 > 0.6", home=tmp_path)
    assert registry.state("m").aliases == {}
    promote(entry, to="challenger", gate="f1 > 0.4", home=tmp_path)
    assert registry.version("m", "challenger") == entry
    assert registry.state("m").pointer == replace(before, seq=before.seq + 1)
    assert registry.history("m")[-1].gate[0]["passed"]


def test_an_alias_is_moved_only_if_what_it_was_judged_by_is_still_so(
    registry: Registry, tmp_path: Path
) -> None:
    def elsewhere(candidate: Candidate) -> bool:
        other = Registry(registry.uri)
        other.register("m", checkpoint="c", manifest_sha256="s")
        if candidate.version.version == 1:
            other.alias("m", "best", 2)
        return True

    alias("m", "best", 2, gate=elsewhere, home=tmp_path)
    with pytest.raises(ConflictError, match="came since"):
        alias("m", "best", 1, gate=elsewhere, home=tmp_path)

    def promotes(_: Candidate) -> bool:
        Registry(registry.uri).promote("m", 2, expect=None)
        return True

    with pytest.raises(ConflictError, match=r"\(promoted\) came since"):
        alias("m", "best", 1, gate=promotes, home=tmp_path)
    assert registry.version("m", "best").version == 2


def test_an_abort_ends_a_trial_and_nothing_else(registry: Registry, tmp_path: Path) -> None:
    registry.start_canary("m", 2, 0.2, expect=None)
    assert abort("m", reason="enough", home=tmp_path).pointer.trial is None
    assert registry.history("m")[-1].reason == "enough"
    with pytest.raises(RegistryError, match="has no canary or shadow to end"):
        abort("m", home=tmp_path)
    assert registry.state("m").pointer.champion == 1


class Replicas(App):
    """Replicas that refuse the events told, while something else happens in the registry."""

    refused: frozenset[int] = frozenset()
    meanwhile: Any = staticmethod(lambda: None)

    def wait_for(self, seq: int, timeout_s: float = 0.0) -> None:
        """Refuse, or be there at once."""
        type(self).meanwhile()
        if seq in self.refused:
            raise ServingError("it is broken")


@pytest.fixture
def turns(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Turns:
    def register() -> None:
        registry.register("m", checkpoint="c.json", manifest_sha256="s")
        registry.alias("m", "challenger", 2)
        registry.describe("m", 2, tags={"owner": "me"})

    monkeypatch.setattr(Replicas, "meanwhile", staticmethod(register))
    return Turns(app=Replicas("m", ""), registry=registry, tell=lambda _: None)


def refuse(monkeypatch: pytest.MonkeyPatch, *events: int) -> None:
    monkeypatch.setattr(Replicas, "refused", frozenset(events))


def test_a_version_that_is_broken_goes_back_whatever_else_happened(
    registry: Registry, turns: Turns, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = registry.promote("m", 2, expect=None)
    refuse(monkeypatch, moved.pointer.seq)
    with pytest.raises(ServingError, match="it is broken"):
        take_up(turns, moved)
    assert registry.state("m").pointer.champion == 1

    moved = registry.start_canary("m", 2, 0.5, expect=None)
    refuse(monkeypatch, moved.pointer.seq)
    with pytest.raises(ServingError, match="it is broken"):
        take_up(turns, moved)
    assert registry.state("m").pointer.trial is None


def test_who_has_moved_the_pointer_meanwhile_has_the_last_word(
    registry: Registry, turns: Turns, monkeypatch: pytest.MonkeyPatch
) -> None:
    third = registry.register("m", checkpoint="c.json", manifest_sha256="s").version
    moved = registry.promote("m", 2, expect=None)
    refuse(monkeypatch, moved.pointer.seq)

    def promote() -> None:
        if registry.state("m").pointer.champion != third:
            registry.promote("m", third, expect=None)

    monkeypatch.setattr(Replicas, "meanwhile", staticmethod(promote))
    with pytest.raises(ServingError, match="it is broken"):
        take_up(turns, moved)
    assert registry.state("m").pointer.champion == third


def test_a_bad_canary_loses_its_traffic_whatever_else_happens(
    registry: Registry, turns: Turns, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.start_canary("m", 2, 0.5, expect=None)

    def bad(*_: object) -> Decision:
        turns.app.wait_for(0)  # a trainer registers while it is judged
        return Decision("rollback", "9 of 9 requests failed")

    monkeypatch.setattr(Move, "_judge", bad)
    refuse(monkeypatch, registry.state("m").pointer.seq + 4)  # the abort, after register()
    move = Move(registry, registry.version("m", 2), [], Carrier(), "", print)
    with pytest.raises(ServingError, match="was rolled back: 9 of 9 requests failed"):
        move._watch(turns.app)
    assert registry.state("m").pointer.trial is None


def test_a_canary_that_was_promoted_by_hand_while_it_was_judged_is_looked_at_again(
    registry: Registry, turns: Turns, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.start_canary("m", 2, 0.5, expect=None)

    def bad(*_: object) -> Decision:
        registry.promote("m", 2, expect=None)
        return Decision("rollback", "9 of 9 requests failed")

    monkeypatch.setattr(Move, "_judge", bad)
    move = Move(registry, registry.version("m", 2), [], Carrier(), "", print)
    assert move._watch(turns.app).pointer.champion == 2


@pytest.mark.parametrize(("patience_s", "action"), [(60.0, "wait"), (0.0, "rollback")])
def test_answers_that_cannot_be_read_are_no_proof(
    registry: Registry, tmp_path: Path, patience_s: float, action: str
) -> None:
    rule = CanaryRule(bake_s=0, patience_s=patience_s)
    registry.start_canary("m", 2, 0.5, expect=None, rule=asdict(rule))
    damaged = tmp_path / "answers" / "m" / "_delta_log"
    damaged.mkdir(parents=True)
    (damaged / f"{0:020}.json").write_text("{")
    move = Move(registry, registry.version("m", 2), [], Carrier(), str(tmp_path), print)
    decision = move._judge(1, is_shadow=False)
    assert decision.action == action
    assert "its answers cannot be read: cannot open the Delta table" in decision.reason


def test_clients_who_wait_less_than_the_champion_takes_fail_nobody(
    registry: Registry, tmp_path: Path
) -> None:
    rule = CanaryRule(bake_s=0, min_requests=1)
    registry.start_canary("m", 2, 0.5, expect=None, rule=asdict(rule))
    moment = int(registry.history("m")[-1].time.timestamp() * 1e6) + 1
    log = AnswerLog(f"{tmp_path}/answers/m", "m")
    told = {"variant": "champion", "trace_id": "", "rows": None, "outputs": {}, "time_us": moment}
    for version, status, latency_ms in ((1, 200, 10.0), (2, 200, 9.0), (2, 504, 19.0)):
        identity = f"{version}{status}"
        about = {"version": version, "status": status, "latency_ms": latency_ms}
        log.add(Answer(request_id=identity, **about, **told))
    assert log.flush()
    move = Move(registry, registry.version("m", 2), [], Carrier(), str(tmp_path), print)
    assert move._judge(1, is_shadow=False).action == "promote"
    about = {"version": 2, "status": 504, "latency_ms": 21.0}
    log.add(Answer(request_id="late", **about, **told))
    log.close()
    decision = move._judge(1, is_shadow=False)
    assert (decision.action, decision.reason) == ("rollback", "1 of 2 requests failed")


def test_of_two_who_watch_one_trial_the_slower_one_finds_it_done(registry: Registry) -> None:
    seen = registry.start_canary("m", 2, 0.5, expect=None)
    told: list[str] = []
    moves = [Move(registry, registry.version("m", 2), [], Carrier(), "", told.append)] * 2
    assert [m.to_champion(seen).pointer.champion for m in moves] == [2, 2]
    assert told == ["version 2 at 100 %"]
    assert [e.kind for e in registry.history("m")].count("promoted") == 2  # the first version, too

    registry.rollback("m", expect=None, reason="no")
    with pytest.raises(ConflictError):
        moves[0].to_champion(seen)


class Refusing(Turns):
    """Of an application whose replicas take nothing up."""

    def settle(self, state: Any) -> None:
        raise ServingError(f"not {state.pointer.seq}")


def spans(tmp_path: Path) -> dict[str, SpanRecord]:
    return {s.name: s for s in spans_of(str(tmp_path / "traces"))}


def test_an_abort_and_a_pause_leave_spans(registry: Registry, tmp_path: Path) -> None:
    registry.start_canary("m", 2, 0.2, expect=None)
    pause("m", home=tmp_path)
    abort("m", home=tmp_path)
    with pytest.raises(RegistryError):
        abort("nobody", home=tmp_path)

    kept = [s for s in spans_of(str(tmp_path / "traces")) if s.status == "ok"]
    told = [e.details["traceparent"] for e in registry.history("m")[-2:]]
    assert [s.name for s in kept] == ["lepton.pause", "lepton.abort"]
    assert [f"00-{s.trace_id}-{s.span_id}-01" for s in kept] == told
    assert [s.attributes for s in kept] == [{"lepton.model": "m", "lepton.version": 2}] * 2
    assert spans(tmp_path)["lepton.abort"].attributes["error.type"] == "RegistryError"


@pytest.mark.parametrize("champion", [True, False])
def test_what_cannot_be_taken_up_is_taken_back_under_the_promotion(
    registry: Registry, tmp_path: Path, champion: bool
) -> None:
    app: Any = SimpleNamespace(model="m")
    under = Carrier(f"00-{'ab' * 16}-{'cd' * 8}-01", str(tmp_path / "traces"))
    turns = Refusing(app=app, registry=registry, tell=print, carrier=under)
    if champion:
        state = registry.promote("m", 2, expect=None)
    else:
        state = registry.start_canary("m", 2, 0.1, expect=None)
    with pytest.raises(ServingError, match="not 4"):
        take_up(turns, state)

    last = registry.history("m")[-1]
    back = spans(tmp_path)["lepton.rollback"]
    assert (last.kind, last.trace_id) == ("rolled_back" if champion else "aborted", "ab" * 16)
    assert last.details["traceparent"] == f"00-{back.trace_id}-{back.span_id}-01"
    assert (back.parent_id, back.attributes["lepton.version"]) == ("cd" * 8, 2)
    assert registry.state("m").pointer.champion == 1
