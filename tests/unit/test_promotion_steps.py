"""The shares that a canary gets one after another, and who carries on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lepton.errors import RegistryError, ServingError
from lepton.promotion import CanaryRule
from lepton.promotion.promote import abort, pause, steps_of
from lepton.promotion.replacing import Turns
from lepton.promotion.trial import Move, Trial, take_up
from lepton.registry import Registry
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


def test_an_abort_ends_a_trial_and_nothing_else(registry: Registry, tmp_path: Path) -> None:
    registry.start_canary("m", 2, 0.2, expect=None)
    assert abort("m", reason="enough", home=tmp_path).pointer.trial is None
    assert registry.history("m")[-1].reason == "enough"
    with pytest.raises(RegistryError, match="has no canary or shadow to end"):
        abort("m", home=tmp_path)
    assert registry.state("m").pointer.champion == 1


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
