import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton.promotion.canary import CanaryRule, Observed, decide

RULE = CanaryRule(bake_s=5, min_requests=20, max_error_rate=0.1, patience_s=60)


def seen(requests=0, errors=0, p99_ms=0.0, given_up=0):
    return Observed(requests=requests, errors=errors, p99_ms=p99_ms, given_up=given_up)


@pytest.mark.parametrize(
    ("canary", "elapsed", "action", "reason"),
    [
        (seen(100, 0), 1, "wait", "baking"),
        (seen(100, 10), 5, "promote", "100 requests, 10 failed"),
        (seen(100, 11), 1, "rollback", "11 of 100 requests failed"),
        (seen(3, 3), 1, "rollback", "3 of 3 requests failed"),
        (seen(3, 2), 1, "wait", "baking"),
        (seen(19, 0), 5, "wait", "19 of 20 requests seen"),
        (seen(20, 0), 5, "promote", "20 requests, 0 failed"),
        (seen(0, 0), 59, "wait", "0 of 20 requests seen"),
        (seen(0, 0), 60, "promote", "only 0 requests came, none failed"),
        (seen(7, 1), 60, "rollback", "1 of only 7 requests failed"),
        (
            seen(7, given_up=3),
            60,
            "rollback",
            "only 7 (and 3 given up by their clients) requests were answered",
        ),
        (seen(20, given_up=3), 60, "promote", "20 requests, 0 failed"),
    ],
)
def test_decides(canary, elapsed, action, reason):
    decision = decide(RULE, canary, seen(500), elapsed)
    assert (decision.action, decision.reason) == (action, reason)


def test_by_default_one_early_failure_is_one_too_many():
    assert decide(CanaryRule(), seen(1, 1), seen(9), 0).action == "rollback"


@pytest.mark.parametrize(
    ("canary", "champion", "action"),
    [
        (seen(20, p99_ms=31), seen(20, p99_ms=10), "rollback"),
        (seen(20, p99_ms=30), seen(20, p99_ms=10), "promote"),
        (seen(20, p99_ms=31), seen(19, p99_ms=10), "wait"),  # too little to compare with
        (seen(19, p99_ms=31), seen(20, p99_ms=10), "wait"),
        (seen(20, p99_ms=31), seen(20, p99_ms=0), "promote"),
    ],
)
def test_latency_counts_once_both_have_been_seen(canary, champion, action):
    rule = CanaryRule(max_latency_ratio=3)
    assert decide(rule, canary, champion, 10).action == action


@pytest.mark.parametrize(
    ("canary", "champion", "elapsed", "action", "reason"),
    [
        (seen(2000, p99_ms=900), seen(19, p99_ms=1), 6, "wait", "the champion's 19 of 20 requests"),
        (seen(19), seen(2000), 6, "wait", "19 of 20 requests seen"),
        (seen(2000), seen(19), 60, "rollback", "only 2000 requests came and, to the champion, 19:"),
        (seen(0), seen(500), 60, "rollback", "only 0 requests came and, to the champion, 500:"),
        (seen(0), seen(0, given_up=1), 60, "rollback", r"0 \(and 1 given up by their clients\):"),
        (seen(0), seen(0), 60, "promote", "only 0 requests came, none failed"),
    ],
)
@pytest.mark.parametrize("asked", [{"max_difference": 0.1}, {"max_latency_ratio": 2.0}])
def test_what_is_to_be_compared_is_waited_for_and_never_taken_for_granted(
    asked, canary, champion, elapsed, action, reason
):
    decision = decide(CanaryRule(**asked), canary, champion, elapsed, 1.0)
    assert decision.action == action
    assert re.search(reason, decision.reason)


@given(st.integers(0, 50), st.integers(0, 50), st.floats(0, 100), st.floats(0, 1), st.booleans())
def test_without_the_evidence_asked_for_nothing_takes_over(mine, its, elapsed, apart, by_latency):
    asked = {"max_latency_ratio": 2.0} if by_latency else {"max_difference": 0.1}
    decision = decide(
        CanaryRule(**asked), seen(mine, p99_ms=1), seen(its, p99_ms=1), elapsed, apart
    )
    if decision.action == "promote":
        assert min(mine, its) >= 20 or mine == its == 0
    if elapsed >= 60:
        assert decision.action != "wait"


@given(
    st.integers(0, 200), st.integers(0, 200), st.floats(0, 100), st.floats(0, 1), st.integers(1, 50)
)
def test_more_failures_never_help_and_waiting_ends(requests, errors, elapsed, rate, least):
    rule = CanaryRule(max_error_rate=rate, min_requests=least)
    order = {"rollback": 0, "wait": 1, "promote": 2}
    fewer, more = min(errors, requests), min(errors + 1, requests)
    better = decide(rule, seen(requests, fewer), seen(), elapsed).action
    assert order[decide(rule, seen(requests, more), seen(), elapsed).action] <= order[better]
    if elapsed < rule.bake_s:
        assert better != "promote"
    if elapsed >= rule.patience_s:
        assert better != "wait"


@pytest.mark.parametrize(
    "wrong",
    [
        {"bake_s": -1.0},
        {"bake_s": math.nan},
        {"bake_s": 61.0},
        {"min_requests": 0},
        {"max_error_rate": 1.1},
        {"max_error_rate": math.nan},
        {"max_latency_ratio": 0.0},
        {"max_latency_ratio": math.nan},
    ],
)
def test_refuses_a_rule_that_cannot_be_meant(wrong):
    with pytest.raises(ValueError, match="must be"):
        CanaryRule(**wrong)
