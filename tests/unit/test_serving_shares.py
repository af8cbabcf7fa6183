"""The same user gets the same version, and a growing share takes nobody's away."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton.monitoring.drift import disagreement, drift
from lepton.serving.shares import gets_it, place_of


@given(st.text(min_size=1), st.floats(0, 1), st.floats(0, 1))
def test_a_user_keeps_the_canary_as_its_share_grows(user: str, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert 0 <= place_of(user, "m") < 1
    assert not gets_it(low, user, "m") or gets_it(high, user, "m")
    assert gets_it(1.0, user, "m")
    assert not gets_it(0.0, user, "m")


def test_users_are_spread_evenly_and_differently_for_each_model() -> None:
    users = [f"user-{i}" for i in range(4000)]
    among = {model: {u for u in users if gets_it(0.25, u, model)} for model in ("m", "n")}

    assert len(among["m"]) == pytest.approx(1000, abs=120)
    assert len(among["m"] & among["n"]) == pytest.approx(250, abs=80)


def test_drift_is_the_distance_of_the_distributions() -> None:
    zeros, ones = np.eye(3)[[0, 0, 0, 0]], np.eye(3)[[0, 0, 0, 1]]
    assert drift(zeros, zeros) == 0
    assert drift(zeros, ones) == pytest.approx(0.25)
    assert drift(zeros, np.eye(3)[[2, 2]]) == 1
    numbers = np.linspace(0, 1, 101)
    assert drift(numbers, numbers[::-1]) == 0
    assert drift(numbers, numbers + 0.25) == pytest.approx(0.25, abs=0.02)
    assert drift(numbers[:0], numbers) == 0


def test_disagreement_is_the_share_of_rows() -> None:
    a = np.eye(3)[[0, 1, 2, 0]]
    b = np.eye(3)[[0, 1, 1, 1]] * 7
    assert disagreement(a, b) == 0.5
    numbers = np.array([1.0, 2.0, 3.0, 5.0])
    assert disagreement(numbers, numbers + 1e-6) == 0
    assert disagreement(numbers, numbers + np.array([0, 0, 0, 1])) == 0.25
