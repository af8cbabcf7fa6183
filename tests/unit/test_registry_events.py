"""What events make of a model's state: pure, no table."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton.errors import RegistryError
from lepton.registry import Event, ModelState, ModelVersion, Pointer
from lepton.registry.events import apply, state_of

START = datetime(2026, 1, 1, tzinfo=UTC)


def event(seq, kind, model="m", **fields):
    return Event(model=model, seq=seq, time=START + timedelta(seconds=seq), kind=kind, **fields)


def registered(seq, version, model="m"):
    entry = ModelVersion(
        model=model, version=version, checkpoint="c", manifest_sha256="s", created=START
    )
    return event(seq, "registered", version=version, registered=entry)


attempts = st.lists(
    st.tuples(
        st.sampled_from(
            ["registered", "shadow", "canary", "paused", "promoted", "aborted", "rolled_back"]
        ),
        st.integers(1, 4),
        st.sampled_from([0.1, 1.0, 0.0, 1.5]),
    ),
    max_size=30,
)


def legal(tries):
    """Events that the fold accepts, with the state after each."""
    state, accepted = ModelState(model="m"), []
    for kind, version, share in tries:
        seq = state.pointer.seq + 1
        tried = event(seq, kind, version=version, share=share)
        if kind == "registered":
            tried = registered(seq, len(state.versions) + 1)
        try:
            state = apply(state, tried)
        except RegistryError:
            continue
        accepted.append((tried, state))
    return accepted


@given(attempts)
def test_every_prefix_has_a_well_defined_pointer(tries):
    before = Pointer()
    for number, (tried, state) in enumerate(legal(tries), start=1):
        pointer = state.pointer
        assert pointer.seq == tried.seq == number
        assert list(state.versions) == list(range(1, len(state.versions) + 1))
        others = {pointer.previous, pointer.canary, pointer.shadow} - {None}
        assert others <= set(state.versions)
        assert pointer.canary is None or pointer.shadow is None
        assert pointer.share == 0 or (0 < pointer.share <= 1 and pointer.trial is not None)
        assert pointer.share > 0 or pointer.trial is None or tried.kind in ("paused", "registered")
        if pointer.champion is None:
            assert not others
            assert before.champion is None  # once there is a champion there always is one
        else:
            assert pointer.champion in set(state.versions) - others
        if tried.kind == "promoted":
            assert (pointer.champion, pointer.previous) == (tried.version, before.champion)
        elif tried.kind == "rolled_back":
            assert (pointer.champion, pointer.previous) == (before.previous, None)
        else:
            assert (pointer.champion, pointer.previous) == (before.champion, before.previous)
        before = pointer


@given(attempts, st.integers(0, 30))
def test_folding_in_two_parts_is_folding_at_once(tries, at):
    events = [e for e, _ in legal(tries)]
    state = state_of("m", events[:at])
    for late in events[at:]:
        state = apply(state, late)
    assert state == state_of("m", events)


BEGUN = state_of("m", [registered(1, 1), registered(2, 2)])
LIVE = apply(BEGUN, event(3, "promoted", version=1))
TRIED = apply(apply(LIVE, registered(4, 3)), event(5, "shadow", version=2, share=0.5))


@pytest.mark.parametrize(
    ("state", "illegal", "message"),
    [
        (BEGUN, event(2, "promoted", version=1), "event 2 .* does not follow event 2"),
        (BEGUN, event(4, "promoted", version=1), "event 4 .* does not follow event 2"),
        (BEGUN, event(3, "promoted", model="n", version=1), "of model 'n' does not follow"),
        (BEGUN, event(3, "promoted", version=3), r"no version 3; it has: \[1, 2\]"),
        (BEGUN, event(3, "promoted"), "no version None"),
        (BEGUN, event(3, "canary", version=1, share=0.1), "no champion beside which"),
        (BEGUN, event(3, "aborted"), "no canary"),
        (BEGUN, event(3, "rolled_back"), "no former champion"),
        (BEGUN, event(3, "crowned", version=1), "unknown kind 'crowned'"),
        (BEGUN, event(3, "registered", version=3), "registers no next version"),
        (BEGUN, registered(3, 4), "registers no next version"),
        (BEGUN, replace(registered(3, 3, model="n"), model="m"), "registers no next version"),
        (LIVE, event(4, "promoted", version=1), "champion already"),
        (LIVE, event(4, "canary", version=1, share=0.1), "champion already"),
        (LIVE, event(4, "canary", version=9, share=0.1), "no version 9"),
        (LIVE, event(4, "canary", version=2, share=0.0), "share"),
        (LIVE, event(4, "canary", version=2, share=1.1), "share"),
        (LIVE, event(4, "canary", version=2, share=float("nan")), "share"),
        (LIVE, event(4, "canary", version=2), "share"),
        (LIVE, event(4, "rolled_back"), "no former champion"),
        (LIVE, event(4, "paused"), "to end or to pause"),
        (LIVE, event(4, "shadow", version=1, share=0.1), "champion already"),
        (TRIED, event(6, "canary", version=3, share=0.1), "version 2 of 'm' is on trial"),
        (LIVE, event(4, "aliased", version=9, details={"alias": "best"}), "no version 9"),
    ],
)
def test_refuses_what_is_not_possible(state, illegal, message):
    with pytest.raises(RegistryError, match=message):
        apply(state, illegal)


def described(seq, version, **details):
    return event(seq, "described", version=version, details=details)


def test_what_is_said_of_a_version_changes_and_what_it_is_does_not():
    said = apply(LIVE, described(4, 2, tags={"owner": "a", "area": "x"}, note="first"))
    said = apply(said, described(5, 2, tags={"owner": None, "stage": "b"}, protected=True))
    entry = said.versions[2]
    assert entry.tags == {"area": "x", "stage": "b"}
    assert (entry.note, entry.protected) == ("first", True)
    unsaid = replace(entry, tags={}, note="", protected=False)
    assert unsaid == LIVE.versions[2]
    assert said.pointer == replace(LIVE.pointer, seq=5)


def test_a_number_is_never_given_again():
    gone = apply(LIVE, event(4, "deleted", version=2))
    assert sorted(gone.versions) == [1]
    with pytest.raises(RegistryError, match="registers no next version"):
        apply(gone, registered(5, 2))
    assert sorted(apply(gone, registered(5, 3)).versions) == [1, 3]


def test_measurements_are_kept_by_snapshot_the_newest_last():
    state = LIVE
    for seq, (table, f1) in enumerate([("t@1", 0.1), ("t@2", 0.2), ("t@1", 0.3)], start=4):
        told = {"table": table, "metrics": {"f1": f1}}
        state = apply(state, event(seq, "measured", version=2, details=told))
    assert list(state.versions[2].measured.items()) == [("t@2", {"f1": 0.2}), ("t@1", {"f1": 0.3})]
    assert state.versions[2].metrics == {}


NAMED = apply(TRIED, event(6, "aliased", version=3, details={"alias": "best"}))
GUARDED = apply(NAMED, described(7, 3, protected=True))


@pytest.mark.parametrize(
    ("state", "version", "message"),
    [
        (GUARDED, 1, "version 1 of 'm' is champion: let another"),
        (GUARDED, 2, "version 2 of 'm' is shadow"),
        (NAMED, 3, "version 3 of 'm' is best"),
        (GUARDED, 3, "version 3 of 'm' is protected: take"),
        (GUARDED, 9, "no version 9"),
        (GUARDED, None, "no version None"),
    ],
)
def test_what_is_needed_is_not_deleted(state, version, message):
    with pytest.raises(RegistryError, match=message):
        apply(state, event(state.pointer.seq + 1, "deleted", version=version))


def test_an_alias_goes_when_it_is_taken_away():
    bare = apply(NAMED, event(7, "aliased", details={"alias": "best"}))
    assert bare.aliases == {}
    assert sorted(apply(bare, event(8, "deleted", version=3)).versions) == [1, 2]
    with pytest.raises(RegistryError, match=r"no alias 'best'; it has: \[\]"):
        apply(bare, event(8, "aliased", details={"alias": "best"}))
