"""What the quick way reads, the careful way reads just so; in doubt, it leaves it to that."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton.serving.arrays import Arrays, arrays_in
from lepton.serving.inputs import BadRequest, Input
from lepton.serving.protocol import inquiry_of, raw_request_of

INPUTS = (
    Input(name="x", datatype="FP32", shape=(2,)),
    Input(name="n", datatype="INT64", shape=()),
)
numbers = st.one_of(
    st.floats(),
    st.floats(-100, 100, width=32),
    st.integers(-(2**70), 2**70),
    st.integers(2**24 - 2, 2**24 + 2),
    st.sampled_from([-(2**63), 2**63 - 1, 3.4028234663852886e38, 3.4028235677973366e38, -1e39]),
    st.booleans(),
    st.none(),
    st.sampled_from(["1", "a", [1.0], {}]),
)
sane = st.one_of(st.floats(-1e6, 1e6), st.integers(-100, 100))


def both(body: bytes, header: str | None = None) -> Arrays | None:
    """Read it both ways; what the quick way takes must be what the careful way takes."""
    quick = arrays_in(body, header.encode() if header else None, INPUTS)
    try:
        careful = inquiry_of(body, INPUTS, ["y"], header)
    except BadRequest:
        assert quick is None
        return None
    if quick is not None:
        assert quick.table().equals(careful.rows)
        assert (quick.identity, quick.raw, quick.size) == (
            careful.identity,
            careful.raw,
            careful.size,
        )
    return quick


def request(x: Any, n: Any, shapes: Any = None, **more: Any) -> bytes:
    rows = len(n) if isinstance(n, list) else 1
    given_shapes = shapes or ([rows, 2], [rows])
    return orjson.dumps(
        {
            "inputs": [
                {"name": "x", "datatype": "FP32", "shape": given_shapes[0], "data": x},
                {"name": "n", "datatype": "INT64", "shape": given_shapes[1], "data": n},
            ],
            **more,
        },
        option=orjson.OPT_PASSTHROUGH_SUBCLASS,
    )


@given(st.lists(st.tuples(sane, sane, st.integers(-(2**62), 2**62)), min_size=1, max_size=5))
def test_ordinary_requests_are_read_at_once(rows: list[Any]) -> None:
    x = [v for a, b, _ in rows for v in (a, b)]
    nested = [[a, b] for a, b, _ in rows]
    n = [c for *_, c in rows]
    assert both(request(x, n)) is not None
    assert both(request(nested, n, id="mine")) is not None


@settings(max_examples=500)
@given(st.lists(numbers, min_size=1, max_size=6), st.lists(numbers, min_size=1, max_size=3))
def test_nothing_is_taken_that_the_careful_way_refuses(x: list[Any], n: list[Any]) -> None:
    big = [v for v in (*x, *n) if isinstance(v, int) and not -(2**63) <= v < 2**63]
    if not big:  # what orjson writes
        both(request(x, n))
        both(request([x[:2]], n))


@pytest.mark.parametrize(
    "more",
    [
        {"parameters": {"binary_data_output": True}},
        {"parameters": {"binary_data_output": False}},
        {"parameters": {"timeout": 5}},
        {"parameters": 3},
        {"outputs": [{"name": "y"}]},
        {"id": 7},
        {"id": "x" * 300},
        {"other": 1},
    ],
)
def test_what_else_a_request_may_say(more: dict[str, Any]) -> None:
    both(request([1.0, 2.0], [3], **more))


@pytest.mark.parametrize(
    "shapes",
    [([1, 2], [2]), ([1, 2, 1], [1]), ([True, 2], [1]), (["1", 2], [1]), ([0, 2], [0]), (2, 1)],
)
def test_shapes_that_do_not_fit(shapes: Any) -> None:
    assert both(request([1.0, 2.0], [3], shapes)) is None


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"inputs": 3}', b'{"inputs": [1, 2]}', b"x"])
def test_other_json(body: bytes) -> None:
    assert both(body) is None


@given(st.integers(1, 4), st.binary(max_size=3), st.integers(-3, 3))
def test_raw_bytes(rows: int, junk: bytes, off: int) -> None:
    arrays = {
        "x": np.arange(2 * rows, dtype=np.float32).reshape(rows, 2),
        "n": np.arange(rows, dtype=np.int64),
    }
    body, length = raw_request_of(arrays)
    assert both(body, str(length)) is not None
    both(body + junk, str(length + off))
    arrays["x"][0, 0] = np.nan
    body, length = raw_request_of(arrays)
    assert both(body, str(length)) is None
