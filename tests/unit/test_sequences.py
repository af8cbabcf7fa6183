"""Sequences: what may be asked, what the net is shown, what comes next."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton.export import TensorSpec
from lepton.serving.inputs import BadRequest, Input
from lepton.serving.sequences import (
    EVENTS,
    LINES,
    TOKENS,
    Wish,
    choice,
    event_of,
    scores_of,
    sequence_of,
    shown,
    wish_of,
)

SPEC = Input(name="x", datatype="INT32", shape=(4,))
EACH = TensorSpec(name="y", dtype="float32", shape=(4, 7))
LAST = TensorSpec(name="y", dtype="float32", shape=(7,))


def body(**members: object) -> bytes:
    return json.dumps({"x": [1, 2], **members}).encode()


def test_a_wish_has_defaults_and_parameters() -> None:
    assert wish_of(body(), SPEC) == Wish(prompt=(1, 2), max_tokens=TOKENS)
    told = {"max_tokens": 3, "temperature": 0.5, "seed": 0, "stop": 6, "timeout": 1500000}
    assert wish_of(body(parameters=told, id="me"), SPEC) == Wish(
        prompt=(1, 2),
        identity="me",
        max_tokens=3,
        temperature=0.5,
        seed=0,
        stop=6,
        patience_s=1.5,
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b"{}", "list of 1 to"),
        (body(x=[]), "list of 1 to"),
        (body(x=[1.5]), "whole numbers"),
        (body(x=[True]), "whole numbers"),
        (body(x=[2**40]), "not INT32"),
        (body(text_input="a"), "the body has members"),
        (body(parameters=[]), "the body has members"),
        (body(parameters={"top_k": 1}), "known are max_tokens"),
        (body(parameters={"max_tokens": 0}), "'max_tokens' must be a whole number from 1"),
        (body(parameters={"max_tokens": 10**6}), "'max_tokens' must be a whole number from 1"),
        (body(parameters={"stop": "a"}), "'stop' must be"),
        (body(parameters={"seed": True}), "'seed' must be"),
        (body(parameters={"temperature": -1}), "from 0 to 100"),
        (body(parameters={"temperature": True}), "from 0 to 100"),
        (body(id=7), "'id' must be a string"),
    ],
)
def test_other_wishes_are_told_what_was_expected(content: bytes, words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        wish_of(content, SPEC)


@pytest.mark.parametrize(
    ("inputs", "scores"),
    [
        ([SPEC, SPEC], LAST),
        ([Input(name="x", datatype="FP32", shape=(4,))], LAST),
        ([Input(name="x", datatype="INT64", shape=())], LAST),
        ([SPEC], TensorSpec(name="y", dtype="float32", shape=())),
        ([SPEC], TensorSpec(name="y", dtype="float32", shape=(5, 7))),
    ],
)
def test_some_models_give_no_sequences(inputs: list[Input], scores: TensorSpec) -> None:
    with pytest.raises(BadRequest, match="this model gives no sequences"):
        sequence_of(inputs, [scores])


def test_the_last_tokens_are_shown_filled_up_where_it_does_not_matter() -> None:
    assert sequence_of([SPEC], [EACH]) == sequence_of([SPEC], [LAST]) == SPEC
    for tokens, each, last in (
        ([5], [5, 0, 0, 0], [0, 0, 0, 5]),
        ([1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]),
        ([1, 2, 3, 4, 5, 6], [3, 4, 5, 6], [3, 4, 5, 6]),
    ):
        assert shown(tokens, SPEC, EACH)["x"].to_pylist() == [each]
        assert shown(tokens, SPEC, LAST)["x"].to_pylist() == [last]


def test_the_scores_are_those_after_the_last_token() -> None:
    each = np.arange(28.0).reshape(1, 4, 7)
    assert list(scores_of(each, 1)) == list(each[0, 0])
    assert list(scores_of(each, 4)) == list(scores_of(each, 9)) == list(each[0, 3])
    assert list(scores_of(each[:, 2], 1)) == list(each[0, 2])


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=9), st.integers(0, 2**32))
def test_chance_follows_the_scores(scores: list[float], seed: int) -> None:
    array = np.array(scores)
    best = int(array.argmax())
    assert choice(array, 0, np.random.default_rng(seed)) == best
    for temperature in (1e-9, 1.0, 100.0):
        found = [choice(array, temperature, np.random.default_rng(seed)) for _ in range(2)]
        assert found[0] == found[1] < len(scores)


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="not numbers"):
        choice(np.array([1.0, np.nan]), 0, np.random.default_rng(0))


def test_pieces_have_the_form_that_was_asked_for() -> None:
    assert event_of({"token": 1}, LINES) == b'{"token":1}\n'
    assert event_of({"token": 1}, EVENTS) == b'data: {"token":1}\n\n'
    assert event_of({"error": "x"}, EVENTS) == b'event: error\ndata: {"error":"x"}\n\n'
