"""Requests by the Open Inference Protocol: right ones become rows, wrong ones are told why."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton.serving.protocol import BadRequest, input_of, request_of, response_of, rows_of

INPUTS = (input_of("x", "float", (2,)), input_of("k", "int64", (), nullable=True))


def body(**changed: Any) -> bytes:
    x = {"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4]}
    k = {"name": "k", "datatype": "INT64", "shape": [2], "data": [5, None]}
    return json.dumps({"id": "a", "inputs": [{**x, **changed}, k]}).encode()


@pytest.mark.parametrize("data", [[1, 2, 3, 4], [[1, 2], [3, 4]]])
def test_flat_and_nested_data_are_the_same_rows(data: list[Any]) -> None:
    rows, identity = rows_of(body(data=data), INPUTS)

    assert rows.to_pylist() == [{"x": [1.0, 2.0], "k": 5}, {"x": [3.0, 4.0], "k": None}]
    assert identity == "a"


@pytest.mark.parametrize(
    ("request_body", "message"),
    [
        (b"{", "the body is not JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"inputs": 3}', "no list 'inputs'"),
        (b'{"inputs": [3]}', "no list 'inputs'"),
        (b'{"inputs": []}', "expected inputs"),
        (body(name="y"), "inputs are ['y', 'k']"),
        (body(name="k"), "expected inputs"),
        (body(datatype="FP64"), "datatype 'FP64'"),
        (body(shape=[2, 3]), "wanted [rows, 2]"),
        (body(shape=[0, 2]), "1 to 4096 rows"),
        (body(shape=[9999, 2]), "1 to 4096 rows"),
        (body(shape="2,2"), "wanted [rows, 2]"),
        (body(data="abcd"), "no list 'data'"),
        (body(data=[1, 2, 3]), "has 3 values, its shape says 4"),
        (body(data=[[1, 2, 3], [4]]), "not nested as its shape"),
        (body(data=[1, 2, 3, "4"]), "values are not FP32"),
        (body(data=[1, 2, 3, True]), "values are not FP32"),
        (body(data=[1, 2, 3, None]), "null is not allowed"),
        (body(data=[1, 2, 3, 1e300]), "finite"),
        (b'{"inputs": [{"name": "x", "data": [NaN]}]}', "the body is not JSON"),
        (body().replace(b'"a"', b"7"), "'id' must be a string"),
    ],
)
def test_a_wrong_request_is_told_what_was_expected(request_body: bytes, message: str) -> None:
    with pytest.raises(BadRequest) as raised:
        rows_of(request_body, INPUTS)
    assert message in str(raised.value)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(("name", "datatype", "shape", "data"), values))
)
def test_nothing_a_client_sends_raises_anything_else(changed: dict[str, Any]) -> None:
    try:
        rows, _ = rows_of(body(**changed), INPUTS)
    except BadRequest:
        return
    assert len(rows) == 2


def test_what_the_client_writes_the_server_reads() -> None:
    rows = pa.table({"x": [[1.5, 2.5]], "k": [7]})
    described = [i.describe() for i in INPUTS]
    read, identity = rows_of(request_of(rows, described, "me"), INPUTS)

    assert read.to_pylist() == rows.to_pylist()
    assert identity == "me"


def test_answers_carry_their_type_and_shape() -> None:
    outputs = {"p": np.array([[0.25, 0.75]], np.float32), "n": np.array([3])}
    found = json.loads(response_of("m", 4, "me", outputs))

    assert found["model_version"] == "4"
    assert found["outputs"] == [
        {"name": "p", "datatype": "FP32", "shape": [1, 2], "data": [0.25, 0.75]},
        {"name": "n", "datatype": "INT64", "shape": [1], "data": [3]},
    ]
