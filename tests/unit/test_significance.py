"""McNemar's test, beside SciPy's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from lepton.promotion.significance import EXACT_UP_TO, chance_of

counts = st.integers(0, 60)


@given(counts, counts)
def test_is_the_exact_sign_test(wins: int, losses: int) -> None:
    if wins + losses:
        exact = binomtest(wins, wins + losses, 0.5, alternative="greater").pvalue
        assert chance_of(wins, losses) == pytest.approx(exact)


@pytest.mark.parametrize("wins", [500, 501, 540, 580])
def test_large_counts_are_approximated(wins: int) -> None:
    losses = EXACT_UP_TO + 1 - wins
    exact = binomtest(wins, wins + losses, 0.5, alternative="greater").pvalue
    assert chance_of(wins, losses) == pytest.approx(exact, rel=0.05, abs=1e-6)


def test_nothing_to_compare_is_all_chance() -> None:
    assert chance_of(0, 0) == 1.0
    assert chance_of(0, 9) == 1.0
    with pytest.raises(ValueError, match="at least 0"):
        chance_of(-1, 0)
