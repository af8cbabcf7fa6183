"""Figures of an evaluation, however the rows were shared out, held against scikit-learn's."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from lepton.errors import TrainingError
from lepton.training.stopping import EarlyStopping
from lepton.training.tallies import Classes, Errors, tally_of, total_of


@given(st.integers(1, 60), st.integers(2, 6), st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_counts_do_not_depend_on_who_counted(rows: int, classes: int, seed: int, by: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(rows, classes))
    labels = rng.integers(0, classes, rows)
    parts = [tally_of("classification", scores[k::by], labels[k::by], "t") for k in range(by)]
    total = total_of(parts)
    answers = scores.argmax(1)
    p, r, f, _ = sk.precision_recall_fscore_support(
        labels, answers, average="macro", zero_division=0
    )

    assert isinstance(total, Classes)
    assert np.array_equal(
        total.confusion, sk.confusion_matrix(labels, answers, labels=range(classes))
    )
    assert total.metrics == pytest.approx(
        {"accuracy": sk.accuracy_score(labels, answers), "precision": p, "recall": r, "f1": f}
    )
    each = sk.precision_recall_fscore_support(
        labels, answers, labels=range(classes), zero_division=0
    )
    found = [[c[k] for c in total.per_class] for k in ("precision", "recall", "f1", "rows")]
    assert np.allclose(found, each)


@given(st.integers(2, 60), st.integers(1, 3), st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_a_regressions_figures_are_scikit_learns(
    rows: int, outputs: int, seed: int, by: int
) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.normal(1e6, 1.0, size=(rows, outputs))
    scores = labels + rng.normal(size=labels.shape)
    parts = [tally_of("regression", scores[k::by], labels[k::by], "t") for k in range(by)]
    total = total_of(parts)

    assert total.rows == rows
    assert total.metrics == pytest.approx(
        {
            "mse": sk.mean_squared_error(labels, scores),
            "mae": sk.mean_absolute_error(labels, scores),
            "r2": sk.r2_score(labels, scores),
        },
        rel=1e-8,
        abs=1e-8,
    )


def test_one_column_of_scores_is_one_output_and_equal_labels_are_no_division_by_zero() -> None:
    found = Errors.of(np.array([[1.0], [3.0]]), np.array([1.0, 1.0]), "t")

    assert found.metrics == {"mse": 2.0, "mae": 1.0, "r2": 0.0}
    assert Errors.of(np.ones(3), np.ones(3), "t").metrics["r2"] == 1.0


@pytest.mark.parametrize(
    ("task", "scores", "labels", "message"),
    [
        ("classification", np.zeros(3), np.zeros(3, int), r"shape \(rows, classes\)"),
        ("classification", np.zeros((3, 2)), np.zeros((3, 2), int), "one whole number a row"),
        ("classification", np.zeros((3, 2)), np.array([0.5, 1, 0]), "one whole number a row"),
        ("classification", np.zeros((3, 2)), np.array([0, -1, 0]), "label -1 is no class"),
        ("regression", np.zeros((3, 2)), np.zeros(3), "must be alike"),
    ],
)
def test_answers_that_do_not_go_with_the_labels(
    task: str, scores: object, labels: object, message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        tally_of(task, scores, labels, "run 'r' on t@0")  # pyright: ignore[reportArgumentType]


def test_a_run_stops_when_it_no_longer_gets_better() -> None:
    stop = EarlyStopping("accuracy", patience=2, min_delta=0.1)
    figures = [(10, 0.5), (20, 0.55), (30, 0.7), (40, math.nan), (50, 0.75)]

    assert [stop.standing(figures[:n]).stop for n in range(6)] == [False] * 5 + [True]
    assert stop.standing(figures).best_step == 30
    assert stop.standing(figures).waited == 2
    assert math.isnan(stop.standing([]).best)
    assert stop.standing([]).best_step == 0
    falling = EarlyStopping("mse", mode="min", patience=1)
    assert not falling.standing([(1, 3.0), (2, 2.0)]).stop
    assert falling.standing([(1, 3.0), (2, 3.0)]).stop
    assert EarlyStopping("x", patience=1).standing([(1, math.nan)]).stop


@pytest.mark.parametrize(
    "options", [{"mode": "up"}, {"patience": 0}, {"patience": 1.5}, {"min_delta": -1.0}]
)
def test_a_rule_that_cannot_be(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        EarlyStopping("accuracy", **options)  # pyright: ignore[reportArgumentType]
