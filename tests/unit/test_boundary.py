"""What is due between two steps, in every combination."""

from hypothesis import given
from hypothesis import strategies as st

from lepton.training.boundary import Act, Due, after_step, at_end

dues = st.builds(
    Due,
    checkpoint=st.booleans(),
    regroup=st.booleans(),
    leaving=st.booleans(),
    lost=st.booleans(),
)


@given(dues, st.booleans())
def test_a_step_is_kept_before_its_ranks_change(due: Due, sharded: bool) -> None:
    acts = due.acts(sharded=sharded)

    assert (Act.JOIN in acts) == (due.lost or due.regroup)
    assert (Act.WAIT in acts) == (due.leaving or (sharded and due.regroup))
    assert due.checkpoint <= (Act.CHECKPOINT in acts)
    if Act.JOIN in acts:
        assert acts[acts.index(Act.JOIN) :] == (Act.JOIN, Act.JUDGE)
        assert not (sharded and due.regroup) or Act.CHECKPOINT in acts
    if due.lost or due.leaving:  # who waits for a judgement may be gone before it
        assert acts[:1] != (Act.JUDGE,)


def test_nothing_is_due_after_most_steps() -> None:
    assert after_step(7, 5, called=0, leaving=0).acts(sharded=False) == (Act.JUDGE,)
    assert after_step(10, 5, called=0, leaving=0).checkpoint
    assert after_step(7, 5, called=2, leaving=1) == Due(checkpoint=True, regroup=True, leaving=True)


@given(dues)
def test_nobody_joins_a_loop_that_ended_by_itself(due: Due) -> None:
    assert at_end(due, exhausted=True) == due
    assert not at_end(due, exhausted=False).regroup
