"""Raw tensors and compressed bodies: what was sent is what is read, and nothing else passes."""

import contextlib
import gzip
import json
import zlib
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lepton.serving.binary import unpacked
from lepton.serving.problems import problem_of
from lepton.serving.protocol import (
    BadRequest,
    Inquiry,
    dtype_of,
    input_of,
    inquiry_of,
    outputs_of_reply,
    raw_request_of,
    reply_of,
)

X = input_of("x", "float", (2,))
TEXT = input_of("t", "string", ())
ELEMENTS = {
    "bool": "BOOL",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "uint8": "UINT8",
    "float": "FP32",
    "double": "FP64",
}


def raw_body(values: np.ndarray[Any, Any], **changed: Any) -> tuple[bytes, str]:
    raw = values.tobytes()
    tensor = {"name": "x", "datatype": "FP32", "shape": list(values.shape)}
    tensor |= {"parameters": {"binary_data_size": len(raw)}} | changed
    text = json.dumps({"id": "a", "inputs": [tensor]}).encode()
    return text + raw, str(len(text))


@given(st.data(), st.sampled_from(sorted(ELEMENTS)), st.sampled_from([(), (3,), (2, 2)]))
def test_raw_tensors_arrive_as_they_were_sent(
    data: st.DataObject, element: str, shape: tuple[int, ...]
) -> None:
    spec = input_of("x", element, shape)
    dtype = dtype_of(ELEMENTS[element])
    finite = {"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else {}
    rows = data.draw(st.integers(1, 4))
    sent = data.draw(
        arrays.arrays(dtype, (rows, *shape), elements=arrays.from_dtype(dtype, **finite))
    )
    body, length = raw_request_of({"x": sent}, "me")
    found = inquiry_of(body, (spec,), header=str(length))

    column: Any = found.rows["x"].combine_chunks()
    flat = column.flatten() if shape else column
    assert np.array_equal(flat.to_numpy(zero_copy_only=False), sent.reshape(-1))
    assert (found.identity, found.raw, len(found.rows)) == ("me", True, rows)


@given(st.lists(st.text(max_size=5), min_size=1, max_size=5))
def test_raw_texts_arrive_as_they_were_sent(texts: list[str]) -> None:
    raw = b"".join(len(t.encode()).to_bytes(4, "little") + t.encode() for t in texts)
    tensor = {"name": "t", "datatype": "BYTES", "shape": [len(texts)]}
    tensor["parameters"] = {"binary_data_size": len(raw)}
    text = json.dumps({"inputs": [tensor]}).encode()

    assert inquiry_of(text + raw, (TEXT,), header=str(len(text))).rows["t"].to_pylist() == texts


@given(
    arrays.arrays(np.float32, (2, 3)), arrays.arrays(np.int64, (2,)), st.booleans(), st.booleans()
)
def test_answers_come_in_the_form_that_was_asked_for(
    p: np.ndarray[Any, Any], n: np.ndarray[Any, Any], p_raw: bool, otherwise: bool
) -> None:
    outputs = {"p": p, "n": n}
    wanted = {"n": not p_raw, "p": p_raw}
    some = Inquiry(rows=pa.table({}), identity="", wanted=wanted, raw=otherwise)
    body, length = reply_of("m", 4, "me", outputs, some)
    found = outputs_of_reply(body, str(length))

    assert list(found) == ["n", "p"]
    assert np.array_equal(found["n"], n)
    if p_raw:
        assert found["p"].tobytes() == p.tobytes()
    everything = Inquiry(rows=pa.table({}), identity="", wanted={}, raw=otherwise)
    body, length = reply_of("m", 4, "me", outputs, everything)
    assert (length is not None) == otherwise
    assert list(outputs_of_reply(body, str(length) if length else None)) == ["p", "n"]


def test_nan_is_a_missing_value_only_where_the_model_fills_them() -> None:
    body, length = raw_body(np.array([[1, np.nan]], np.float32))
    filled = input_of("x", "float", (2,), nullable=True)

    assert inquiry_of(body, (filled,), header=length).rows["x"].to_pylist() == [[1.0, None]]
    with pytest.raises(BadRequest, match="must be finite"):
        inquiry_of(body, (X,), header=length)
    body, length = raw_body(np.array([[1, np.inf]], np.float32))
    with pytest.raises(BadRequest, match="must be finite"):
        inquiry_of(body, (filled,), header=length)


ONE = np.array([[1, 2]], np.float32)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"parameters": {"binary_data_size": 4}}, "4 raw bytes that belong to no input|has 4 raw"),
        ({"parameters": {"binary_data_size": 9}}, "binary_data_size is 9, 8 raw bytes are left"),
        ({"parameters": {"binary_data_size": -1}}, "binary_data_size is -1"),
        ({"parameters": {"binary_data_size": True}}, "binary_data_size is True"),
        ({"parameters": 3}, "'parameters' of input 'x' must be a JSON object"),
        ({"parameters": {"shared_memory_region": "r"}}, "not supported here"),
        ({"data": [1, 2]}, "has both 'data' and raw bytes"),
        ({"shape": [2, 2]}, "has 8 raw bytes; 4 values of FP32 are 16"),
    ],
)
def test_raw_bytes_that_do_not_fit_are_refused(changed: dict[str, Any], message: str) -> None:
    body, length = raw_body(ONE, **changed)
    with pytest.raises(BadRequest, match=message):
        inquiry_of(body, (X,), header=length)


@pytest.mark.parametrize("length", ["", "-1", "x", "1.0", "99999", "9" * 20, "²"])
def test_a_wrong_length_of_the_json_is_refused(length: str) -> None:
    with pytest.raises(BadRequest, match="Inference-Header-Content-Length"):
        inquiry_of(raw_body(ONE)[0], (X,), header=length)


@pytest.mark.parametrize(
    ("spec", "datatype", "raw"),
    [
        (input_of("x", "bool", ()), "BOOL", b"\x02"),
        (input_of("x", "string", ()), "BYTES", b"\x01\x00\x00\x00\xff"),
        (input_of("x", "string", ()), "BYTES", b"\x09\x00\x00\x00a"),
        (input_of("x", "string", ()), "BYTES", b"\x01\x00\x00\x00ab"),
    ],
)
def test_bytes_that_are_none_of_their_datatype_are_refused(
    spec: Any, datatype: str, raw: bytes
) -> None:
    body, length = raw_body(np.frombuffer(raw, np.uint8), datatype=datatype, shape=[1])
    with pytest.raises(BadRequest, match=r"0 or 1|not UTF-8|whole texts"):
        inquiry_of(body, (spec,), header=length)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"outputs": 3}, "no list 'outputs'"),
        ({"outputs": [{"name": "q"}]}, "'q' is not one of the model's"),
        ({"outputs": [{"name": "p"}, {"name": "p"}]}, "asked for twice"),
        ({"outputs": [{"name": ["p"]}]}, "not one of the model's"),
        ({"outputs": [{"name": "p", "parameters": {"binary_data": 1}}]}, "true or false"),
        ({"outputs": [{"name": "p", "parameters": {"classification": 3}}]}, "not supported"),
        ({"parameters": {"binary_data_output": "yes"}}, "true or false"),
    ],
)
def test_wrong_wishes_for_outputs_are_refused(asked: dict[str, Any], message: str) -> None:
    x = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}
    with pytest.raises(BadRequest, match=message):
        inquiry_of(json.dumps({"inputs": [x], **asked}).encode(), (X,), ["p"])


@given(st.binary(max_size=40), st.none() | st.text("0123456789", max_size=3))
def test_no_bytes_raise_anything_else(body: bytes, length: str | None) -> None:
    with pytest.raises(BadRequest):
        inquiry_of(body, (X,), header=length)


@given(st.binary(max_size=200))
def test_compressed_bodies_are_unpacked(body: bytes) -> None:
    assert unpacked(gzip.compress(body), "gzip") == body
    assert unpacked(gzip.compress(body) * 2, "GZIP") == body * 2
    assert unpacked(zlib.compress(body), "deflate") == body
    assert unpacked(body, "identity") == unpacked(body, "") == body


@given(st.binary(max_size=40), st.sampled_from(["gzip", "deflate"]))
def test_damaged_bodies_raise_nothing_else(body: bytes, encoding: str) -> None:
    with contextlib.suppress(BadRequest):
        unpacked(body, encoding)


def test_a_body_never_unpacks_beyond_the_limit() -> None:
    for body in (gzip.compress(bytes(10**6)), gzip.compress(bytes(600)) * 2):
        with pytest.raises(BadRequest, match="more than 1000 bytes") as raised:
            unpacked(body, "gzip", 1000)
        assert raised.value.status == 413
    with pytest.raises(BadRequest, match="cut short"):
        unpacked(gzip.compress(b"abc")[:-2], "gzip")
    with pytest.raises(BadRequest, match="use gzip or deflate") as raised:
        unpacked(b"", "br")
    assert raised.value.status == 415


def test_a_problem_says_what_and_why() -> None:
    assert json.loads(problem_of(404, "no such version", versions=["1"])) == {
        "type": "about:blank",
        "title": "Not Found",
        "status": 404,
        "detail": "no such version",
        "error": "no such version",
        "versions": ["1"],
    }
