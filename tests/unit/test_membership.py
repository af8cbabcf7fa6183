"""Who trains with whom: decided by messages in any order, never by time spent."""

from hypothesis import given
from hypothesis import strategies as st

from lepton.training.membership import Generation, Membership
from lepton.training.recovery import in_a_row


def settled(*members: str, fewest: int = 1, most: int = 4, step: int | None = None) -> Membership:
    """A membership whose members train."""
    who = Membership(fewest=fewest, most=most, expected=len(members), settle_s=10)
    for member in members:
        who.arrive(member, step, now=0)
    assert who.form(0) is not None
    who.formed()
    return who


def test_a_beginning_waits_for_all_that_are_expected() -> None:
    who = Membership(fewest=1, most=4, expected=2)
    who.arrive("a", None, now=0)
    assert who.form(1) is None
    who.arrive("b", None, now=1)
    formed = who.form(1)

    assert formed == Generation(number=0, members=("a", "b"), steps={"a": None, "b": None})
    assert formed.source is None
    assert formed.behind == ()


def test_a_beginning_goes_on_without_one_that_never_came_but_not_without_one_that_builds() -> None:
    who = Membership(fewest=1, most=4, expected=2, settle_s=10)
    who.arrive("a", None, now=0)
    who.enter("b")
    assert who.form(11) is None  # it is there, and builds its model
    who.lose("b")
    assert who.form(9) is None
    assert who.form(11) is not None


def test_survivors_go_on_at_once_and_keep_their_order() -> None:
    who = settled("a", "b", "c")
    who.lose("a")
    who.arrive("c", 7, now=5)
    assert who.form(5) is None
    who.arrive("b", 7, now=5)
    formed = who.form(5)

    assert formed is not None
    assert formed.members == ("b", "c")
    assert formed.source == 0
    assert formed.behind == ()


def test_the_member_furthest_on_hands_its_state_over() -> None:
    who = settled("a", "b", "c")
    who.lose("c")
    who.arrive("a", 7, now=1)
    who.arrive("b", 8, now=1)
    who.arrive("new", None, now=1)
    formed = who.form(1)

    assert formed is not None
    assert formed.members == ("a", "b", "new")
    assert (formed.source, formed.behind) == (1, (0, 2))


def test_newcomers_call_the_members_together_only_if_there_is_room() -> None:
    who = settled("a", "b", most=3)
    assert not who.calls
    who.arrive("c", None, now=1)
    assert who.calls
    for member in ("a", "b"):
        who.arrive(member, 3, now=2)
    formed = who.form(2)
    who.formed()
    assert formed is not None
    assert len(formed.members) == 3
    who.arrive("spare", None, now=3)
    assert not who.calls


def test_one_that_is_let_go_leaves_at_the_boundary() -> None:
    who = settled("a", "b")
    who.release("a")
    assert who.calls
    who.arrive("b", 4, now=1)
    assert who.form(1) is None
    who.arrive("a", 4, now=1)
    assert who.depart() == ["a"]
    formed = who.form(1)

    assert formed is not None
    assert formed.members == ("b",)
    assert who.depart() == []


def test_a_generation_is_taken_back_when_a_member_is_lost_meanwhile() -> None:
    who = settled("a", "b", "c")
    for member in ("a", "b", "c"):
        who.arrive(member, 2, now=1)
    assert who.form(1) is not None
    who.lose("b")  # before the others were told; only "a" was, and arrives anew
    assert who.form(1) is None
    who.arrive("a", 2, now=1)
    formed = who.form(1)

    assert formed is not None
    assert set(formed.members) == {"a", "c"}
    assert formed.number == 2


def test_losses_count_as_long_as_the_run_does_not_get_on() -> None:
    assert in_a_row([], 100) == 0
    assert in_a_row([5, 5, 6], 100) == 3
    assert in_a_row([5, 300, 350, 390], 100) == 3
    assert in_a_row([5, 300, 800], 100) == 1


MOVES = st.lists(
    st.tuples(st.sampled_from(["enter", "arrive", "lose", "release"]), st.integers(0, 5)),
    max_size=40,
)


@given(MOVES, st.integers(1, 4))
def test_whatever_happens_the_living_train_together(
    moves: list[tuple[str, int]], most: int
) -> None:
    who = Membership(fewest=1, most=most, expected=1)
    alive: set[str] = set()
    step, leaving, numbers = 0, set[str](), []
    for move, k in moves:
        name = f"m{k}"
        if move == "lose":
            who.lose(name)
            alive.discard(name)
            leaving.discard(name)
        elif move == "release":
            who.release(name)
            leaving |= {name} & (set(who.members) | set(who.waiting))
        elif move == "enter" and name not in alive:
            who.enter(name)
            alive.add(name)
        elif move == "arrive" and name not in who.waiting:
            who.arrive(name, step if name in who.members else None, now=0)
            alive.add(name)
        for gone in who.depart():
            alive.discard(gone)
            leaving.discard(gone)
        before = list(who.members)
        formed = who.form(0)
        assert not set(who.waiting) & set(formed.members if formed else ())
        if formed is not None:
            numbers.append(formed.number)
            survivors = [m for m in before if m not in leaving]
            assert list(formed.members[: len(survivors)]) == survivors
            assert len(formed.members) <= max(most, len(survivors))
            assert set(formed.members) <= alive
            who.formed()
            step += 1
    assert numbers == sorted(set(numbers))
    for name in list(who.members):
        who.arrive(name, step, now=0)
    who.depart()
    if set(who.members) - leaving:
        assert who.form(0) is not None
