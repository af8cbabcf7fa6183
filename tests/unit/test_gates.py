import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton.errors import GateError
from lepton.promotion.gates import check_all, parse

METRICS = {"accuracy": 0.981, "f1": 0.95, "loss": 0.1}
CHAMPION = {"accuracy": 0.98, "f1": 0.96}


@pytest.mark.parametrize(
    ("gate", "passed"),
    [
        ("accuracy >= 0.9662", True),
        ("accuracy < 0.9662", False),
        ("0.9 < f1 <= 0.95 < accuracy", True),
        ("0.9 < f1 < 0.95 < accuracy", False),
        ("accuracy >= champion - 0.002", True),
        ("accuracy >= champion * 1.01", False),
        ("f1 > champion.f1 or loss == 0.1", True),
        ("f1 > champion.f1 and loss != 0.2", False),
        ("not (f1 > champion.f1 or loss > 0.5)", True),
        ("accuracy + f1 >= champion.accuracy + champion.f1 - 0.02", True),
        ("-loss > -0.2 and (accuracy / 2) > .4", True),
        ("  accuracy > 0  ", True),
        ("champion.f1 > 0.9", True),
    ],
)
def test_judges(gate, passed):
    result = parse(gate).check(METRICS, CHAMPION)
    assert (result.expression, result.passed) == (gate, passed)


@pytest.mark.parametrize(
    ("gate", "details"),
    [
        ("accuracy >= 0.9662", ["accuracy = 0.981 >= 0.9662: passed"]),
        ("accuracy >= champion", ["accuracy = 0.981 >= champion = 0.98: passed"]),
        ("0.5 < f1 < champion.f1 - 0.1", ["0.5 < f1 = 0.95 < champion.f1 - 0.1 = 0.86: failed"]),
        ("not loss > -1", ["not (loss = 0.1 > -1): failed"]),
        ("loss < 1 or f1 > 1", ["loss = 0.1 < 1: passed", "f1 = 0.95 > 1: failed"]),
    ],
)
def test_says_how_it_went(gate, details):
    assert list(parse(gate).check(METRICS, CHAMPION).details) == details


def test_metrics_are_those_of_the_candidate():
    assert parse("accuracy > champion.f1 and not loss > 1").metrics == {"accuracy", "loss"}


@pytest.mark.parametrize(
    ("gate", "passed"),
    [
        ("accuracy >= champion", True),
        ("not accuracy < champion", True),
        ("accuracy >= champion and f1 > 0.99", False),
        ("f1 > champion.f1 or f1 > 0.99", True),
    ],
)
def test_without_a_champion_what_is_asked_against_it_is_met(gate, passed):
    result = parse(gate).check(METRICS)
    assert result.passed is passed
    assert "passed, no champion yet" in result.details[0]


@pytest.mark.parametrize(
    "gate", ["x > 0", "not x > 0", "x != 0", "f1 / (loss - 0.1) > 0", "x == x"]
)
def test_what_is_not_a_number_meets_nothing(gate):
    result = parse(gate).check({**METRICS, "x": math.nan})
    assert not result.passed
    assert "not a number" in result.details[0]


def test_a_champion_that_is_not_a_number_is_not_beaten():
    assert not parse("f1 >= champion").check(METRICS, {"f1": math.nan}).passed


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("accuracy >", "cannot parse.*its end"),
        ("accuracy = 0.9", "cannot parse.*character 1.*a gate compares"),
        ("accuracy > 96.62%", "write 96.62% as 0.9662"),
        ("accuracy > 96 % and f1 > 0", "write 96% as 0.96"),
        ("accuracy > 96. % f1", "write 96.% as 0.96"),
        ("", "cannot parse"),
        ("accuracy", "'accuracy' is no comparison"),
        ("accuracy in f1", "is no comparison"),
        ("accuracy > (f1 > 0.5)", "'f1 > 0.5' is no metric or number"),
        ("accuracy > 0.9 and -f1", "'-f1' is no comparison"),
        ("accuracy > +1", r"'\+1' is no metric"),
        ("accuracy > True", "'True' is no metric"),
        ("accuracy > '0.9'", "is no metric"),
        ("accuracy > 1e999", "is no metric"),
        ("accuracy > 1" + "0" * 400, "is no metric"),
        ("accuracy ** 2 > 1", "is no metric"),
        ("max(accuracy, 1) > 0", "is no metric"),
        ("accuracy.real > 0", "is no metric"),
        ("champion.f1.real > 0", "is no metric"),
        ("__import__('os').system('true') > 0", "is no metric"),
        ("accuracy + f1 > champion", "exactly one metric"),
        ("champion > 0.9", "exactly one metric"),
        ("f1 > 1 - (champion - champion.f1) - accuracy", "exactly one metric"),
        ("a > " + "-" * 5000 + "1", "nested too deeply"),
        ("a > " + "1+" * 5000 + "1", "nested too deeply"),
    ],
)
def test_refuses_what_is_no_gate(gate, message):
    with pytest.raises(GateError, match=message):
        parse(gate)


def test_a_metric_that_was_not_computed_is_named_beside_those_that_were():
    with pytest.raises(
        GateError, match=r"names auc, recall, which .* there are: accuracy, f1, loss"
    ):
        parse("recall > 0 and auc > 0").check(METRICS)
    with pytest.raises(GateError, match="there are: no metrics"):
        parse("recall > 0").check({})
    with pytest.raises(GateError, match=r"champion's loss, .* it has: accuracy, f1"):
        parse("loss < champion").check(METRICS, CHAMPION)
    with pytest.raises(GateError, match="it has: no metrics"):
        parse("loss < champion").check(METRICS, {})


def test_several_are_all_judged():
    results = check_all(["accuracy > 1", parse("f1 > champion")], METRICS, None)
    assert [r.passed for r in results] == [False, True]
    assert check_all([], METRICS) == []


numbers = st.recursive(
    st.sampled_from(["accuracy", "f1", "champion.accuracy", "champion.f1", "0.5", "2", "1e-3"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda t: f"({' '.join(t)})"),
        inner.map(lambda text: f"-{text}"),
    ),
    max_leaves=4,
)
comparisons = st.tuples(
    numbers,
    st.lists(
        st.tuples(st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), numbers),
        min_size=1,
        max_size=2,
    ),
).map(lambda t: " ".join([t[0], *(f"{op} {n}" for op, n in t[1])]))
conditions = st.recursive(
    comparisons,
    lambda inner: st.one_of(
        inner.map(lambda text: f"not ({text})"),
        st.tuples(inner, st.sampled_from([" and ", " or "]), inner).map(
            lambda t: f"({t[0]}{t[1]}{t[2]})"
        ),
    ),
    max_leaves=4,
)
shares = st.floats(-2, 2)


@settings(max_examples=80, deadline=None)
@given(conditions, shares, shares, shares, shares)
def test_means_what_python_means(gate, accuracy, f1, champion_accuracy, champion_f1):
    metrics = {"accuracy": accuracy, "f1": f1}
    champion = {"accuracy": champion_accuracy, "f1": champion_f1}
    expected = eval(gate, {}, {**metrics, "champion": SimpleNamespace(**champion)})
    assert parse(gate).check(metrics, champion).passed is expected


@settings(max_examples=50, deadline=None)
@given(conditions)
def test_undecided_comparisons_settle_the_gate_whatever_its_nots(gate):
    nothing = {"accuracy": math.nan}
    lone = gate.replace("champion.", "").replace("f1", "accuracy")
    for number in ("0.5", "2", "1e-3"):
        lone = lone.replace(number, "accuracy")
    assert not parse(lone).check(nothing).passed
    assert parse(lone.replace("accuracy", "champion.f1")).check({}).passed
