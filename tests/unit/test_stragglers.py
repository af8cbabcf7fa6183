"""Who is named as the one that the others wait for."""

import io
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lepton import telemetry
from lepton.telemetry import Carrier, spans_of
from lepton.training.progress import Line, described
from lepton.training.rendezvous import Event
from lepton.training.stragglers import FACTOR, LEAST_S, Slow, Stragglers

STEADY = {"a": 0.1, "b": 0.11, "c": 0.09}


def test_a_slow_rank_is_named_once_after_some_seconds_and_again_after_it_kept_up() -> None:
    seen = Stragglers(lasting_s=5)
    slow = {**STEADY, "c": 0.4}

    assert seen.look(STEADY, 0) == []
    assert seen.look(slow, 1) == seen.look(slow, 5.9) == []
    (found,) = seen.look(slow, 6)
    assert (found.who, found.own_s) == ("c", 0.4)
    assert "4.0 times the others'" not in found.text
    assert "3.8 times the others' 0.105 s" in found.text
    assert seen.look(slow, 7) == []
    assert seen.look(STEADY, 8) == seen.look(slow, 9) == []
    assert [s.who for s in seen.look(slow, 14)] == ["c"]


def test_a_break_begins_the_time_anew() -> None:
    seen = Stragglers(lasting_s=5)
    slow = {**STEADY, "a": 1.0}
    for now in (0, 4):
        assert seen.look(slow, now) == []
    assert seen.look(STEADY, 4.5) == seen.look(slow, 5) == seen.look(slow, 9) == []
    assert seen.look({}, 20) == []


def test_differences_of_nothing_are_none() -> None:
    seen = Stragglers(lasting_s=0)

    assert seen.look({"a": 0.0001, "b": 0.001}, 0) == []
    assert seen.look({"a": 9.0}, 0) == [], "nobody waits for it"
    assert [s.who for s in seen.look({"a": 0.0, "b": 1.0}, 0)] == ["b"]
    assert "inf times" in Slow(who="b", own_s=1.0, others_s=0.0).text


TIMES = st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 10), max_size=6)


@given(TIMES)
def test_who_is_named_takes_long_and_never_everybody(own: dict[str, float]) -> None:
    found = Stragglers(lasting_s=0).look(own, 0)

    for slow in found:
        assert own[slow.who] >= FACTOR * slow.others_s
        assert own[slow.who] - slow.others_s >= LEAST_S
    assert len(found) < max(1, len(own))


def test_the_progress_line_shows_it() -> None:
    detail = Slow(who="w", own_s=0.4, others_s=0.1).text
    event = Event(kind="slow", who="w", world_size=3, step=7, time_ns=1, detail=detail)

    assert described(event) == f"worker w is slow after step 7: {detail}"


def test_the_trace_and_the_line_name_each_of_them_once(tmp_path: Path) -> None:
    from lepton.training.lookout import record_stragglers

    directory = str(tmp_path / "traces")
    shown = io.StringIO()
    line = Line("r", 100, 10, Console(file=shown, width=200))
    events = [Event(kind="slow", who=w, world_size=3, step=7, time_ns=1, detail="x") for w in "ab"]
    with telemetry.span("lepton.train", Carrier("", directory)) as span:
        told = record_stragglers(span.carrier, events[:1], 0)
        assert record_stragglers(span.carrier, events, told) == 2
        line.tell(events[:1])
        line.tell(events)
    found = [s for s in spans_of(directory) if s.name == "lepton.train.straggler"]

    assert sorted(s.attributes["lepton.worker"] for s in found) == ["a", "b"]
    assert [x.split(":")[1] for x in shown.getvalue().splitlines()] == [
        f" worker {w} is slow after step 7" for w in "ab"
    ]
