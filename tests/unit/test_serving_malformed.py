"""Requests that are wrong in every way somebody could think of: refused with 4xx and a reason.

None may pass, none may be the server's fault (500), and none may cost more memory than its size.
"""

from __future__ import annotations

import gzip
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import orjson
import pytest

from lepton.serving.arrays import arrays_in
from lepton.serving.binary import unpacked
from lepton.serving.inputs import MAX_ROWS, BadRequest, Input
from lepton.serving.plain import inquiry_of_rows
from lepton.serving.protocol import inquiry_of

X = (Input(name="x", datatype="FP32", shape=(3,)),)
GOOD: dict[str, Any] = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1.0, 2.0, 3.0]}
RAW = struct.pack("<3f", 1, 2, 3)
HUGE = 2**63 - 1


def tensor(**members: Any) -> dict[str, Any]:
    return {k: v for k, v in (GOOD | members).items() if v is not Ellipsis}


def body(*tensors: Any, **members: Any) -> bytes:
    return orjson.dumps({"inputs": list(tensors) or [GOOD], **members})


WRONG_JSON: dict[str, bytes] = {
    "nothing": b"",
    "half of it": body()[:-9],
    "two of them": body() + body(),
    "not UTF-8": b'{"inputs": "\xff\xfe"}',
    "a NUL": b"\0" + body(),
    "a list": b"[]",
    "a number": b"1e400",
    "deep lists": b"[" * 100_000,
    "deep lists that end": b'{"inputs":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"inputs":' * 100_000 + b"1" + b"}" * 100_000,
    "no inputs": b"{}",
    "inputs are an object": b'{"inputs": {}}',
    "inputs are numbers": b'{"inputs": [1]}',
    "an input twice": body(GOOD, GOOD),
    "an input too many": body(GOOD, tensor(name="y")),
    "an input of no name": body(tensor(name=...)),
    "an input named by a list": body(tensor(name=["x"])),
    "no shape": body(tensor(shape=...)),
    "an empty shape": body(tensor(shape=[])),
    "a flat shape": body(tensor(shape=[3])),
    "a negative shape": body(tensor(shape=[-1, -3])),
    "no rows": body(tensor(shape=[0, 3], data=[])),
    "rows beyond the limit": body(tensor(shape=[MAX_ROWS + 1, 3])),
    "a shape whose product overflows": body(tensor(shape=[HUGE, 3])),
    "a shape whose product comes round to 3": body(tensor(shape=[6148914691236517206, 3])),
    "a shape of floats": body(tensor(shape=[1.0, 3.0])),
    "a shape of true": body(tensor(shape=[True, 3])),
    "a shape of texts": body(tensor(shape=["1", "3"])),
    "a shape that is a text": body(tensor(shape="13")),
    "a shape of many dimensions": body(tensor(shape=[1] * 10_000 + [3])),
    "a row too few": body(tensor(shape=[2, 3])),
    "no data": body(tensor(data=...)),
    "data is null": body(tensor(data=None)),
    "data is a text": body(tensor(data="AAAA")),
    "data is an object": body(tensor(data={"0": 1.0})),
    "data of texts": body(tensor(data=["1", "2", "3"])),
    "data of true": body(tensor(data=[True, True, False])),
    "data of nulls": body(tensor(data=[1.0, None, 3.0])),
    "data of objects": body(tensor(data=[{}, {}, {}])),
    "ragged data": body(tensor(shape=[2, 3], data=[[1.0, 2.0, 3.0], [1.0, 2.0]])),
    "nested too deep": body(tensor(data=[[[1.0, 2.0, 3.0]]])),
    "NaN": body().replace(b"2.0", b"NaN"),
    "beyond FP32": body().replace(b"2.0", b"1e39"),
    "beyond FP64": body().replace(b"2.0", b"1e400"),
    "another datatype": body(tensor(datatype="FP64")),
    "an unknown datatype": body(tensor(datatype="FP7")),
    "datatype is a number": body(tensor(datatype=32)),
    "raw bytes that are not there": body(tensor(data=..., parameters={"binary_data_size": 12})),
    "parameters are a list": body(parameters=[1]),
    "an id that is no text": body(id=7),
    "an id too long": body(id="x" * 257),
    "a timeout before now": body(parameters={"timeout": -1}),
    "a timeout of true": body(parameters={"timeout": True}),
    "an unknown output": body(outputs=[{"name": "z"}]),
    "an output twice": body(outputs=[{"name": "output"}, {"name": "output"}]),
    "outputs are texts": body(outputs=["output"]),
    "memory of somebody's": body(tensor(parameters={"shared_memory_region": "/etc/passwd"})),
}


@pytest.mark.parametrize("name", WRONG_JSON)
def test_wrong_json_is_refused(name: str) -> None:
    refused(WRONG_JSON[name], None)


def refused(given: bytes, header: str | None, inputs: tuple[Input, ...] = X) -> str:
    """See that both ways refuse a body, soon and with a reason."""
    if all(i.datatype == "FP32" for i in inputs):
        assert arrays_in(given, header.encode() if header is not None else None, inputs) is None
    with pytest.raises(BadRequest) as raised:
        inquiry_of(given, inputs, ["output"], header)
    assert 400 <= raised.value.status < 500
    assert len(str(raised.value)) > 10
    return str(raised.value)


def raw(announced: Any, sent: bytes, **members: Any) -> tuple[bytes, str]:
    text = body(tensor(data=..., parameters={"binary_data_size": announced}, **members))
    return text + sent, str(len(text))


NAN, INFINITE = (struct.pack("<3f", 1, v, 3) for v in (float("nan"), float("inf")))
WRONG_RAW: dict[str, tuple[bytes, str]] = {
    "a byte too few": raw(12, RAW[:-1]),
    "a byte too many": raw(12, RAW + b"\0"),
    "fewer announced": raw(11, RAW),
    "none announced": raw(0, RAW),
    "more than there are": raw(HUGE, RAW),
    "less than none": raw(-12, RAW),
    "a float": raw(12.0, RAW),
    "true": raw(True, RAW),
    "a text": raw("12", RAW),
    "more rows than bytes": raw(12, RAW, shape=[2, 3]),
    "a product that overflows": raw(12, RAW, shape=[HUGE, 3]),
    "NaN": raw(12, NAN),
    "infinity": raw(12, INFINITE),
    "a length beyond the body": (raw(12, RAW)[0], "99999"),
    "a length of nothing": (raw(12, RAW)[0], "0"),
    "a negative length": (raw(12, RAW)[0], "-5"),
    "a length in words": (raw(12, RAW)[0], "ten"),
    "an empty length": (raw(12, RAW)[0], ""),
    "other people's digits": (raw(12, RAW)[0], "١٢"),
    "a length of a thousand digits": (raw(12, RAW)[0], "1" * 1000),
    "within the JSON": (raw(12, RAW)[0], "20"),
}


@pytest.mark.parametrize("name", WRONG_RAW)
def test_wrong_raw_bytes_are_refused(name: str) -> None:
    given, header = WRONG_RAW[name]
    if header.isascii():
        refused(given, header)
    else:
        with pytest.raises(BadRequest):
            inquiry_of(given, X, ["output"], header)


@pytest.mark.parametrize(
    ("datatype", "sent", "words"),
    [
        ("BOOL", b"\0\1\2", "must be 0 or 1"),
        ("BOOL", b"\0\1", "raw bytes"),
        ("BYTES", b"\1\0\0\0a\1\0\0\0b", "hold 2 whole texts"),
        ("BYTES", b"\1\0\0\0a\1\0\0\0b\xff\xff\xff\xffc", "hold 2 whole texts"),
        ("BYTES", b"\1\0\0\0a\1\0\0\0b\1\0\0\0cd", "hold 3 whole texts in 15 of 16"),
        ("BYTES", b"\1\0\0\0\xff\0\0\0\0\0\0\0\0", "not UTF-8"),
        ("INT64", RAW, "raw bytes"),
        ("UINT8", b"\1\2", "raw bytes"),
    ],
)
def test_raw_bytes_that_lie_are_refused(datatype: str, sent: bytes, words: str) -> None:
    inputs = (Input(name="x", datatype=datatype, shape=(3,)),)
    given, header = raw(len(sent), sent, datatype=datatype)
    assert words in refused(given, header, inputs)


def test_a_bomb_is_refused_before_it_goes_off() -> None:
    limit = 2**20
    bomb = gzip.compress(bytes(16 * limit))
    twice = gzip.compress(bytes(limit)) + gzip.compress(b"x")
    tracemalloc.start()
    try:
        for given in (bomb, twice):
            with pytest.raises(BadRequest, match="unpacks to more than") as raised:
                unpacked(given, "gzip", limit)
            assert raised.value.status == 413
        assert tracemalloc.get_traced_memory()[1] < 4 * limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("given", "encoding", "status"),
    [
        (b"no gzip", "gzip", 400),
        (gzip.compress(body())[:-4], "gzip", 400),
        (gzip.compress(body())[:20] + b"????" + gzip.compress(body())[24:], "gzip", 400),
        (gzip.compress(body()) + b"more", "gzip", 400),
        (b"", "gzip", 400),
        (zlib.compress(body()), "gzip", 400),
        (body(), "br", 415),
        (body(), "gzip, gzip", 415),
    ],
)
def test_packing_that_is_wrong_is_refused(given: bytes, encoding: str, status: int) -> None:
    with pytest.raises(BadRequest) as raised:
        unpacked(given, encoding)
    assert raised.value.status == status


@pytest.mark.parametrize(
    "given",
    [
        b"", b"[]", b"{}", b'{"rows": {}}', b'{"rows": []}', b'{"rows": [1]}', b'{"rows": [[]]}',
        b'{"rows": [{"x": null}]}', b'{"rows": [{"x": [1, 2]}]}', b'{"rows": [{"x": [[1, 2, 3]]}]}',
        b'{"rows": [{"x": [1, 2, "3"]}]}', b'{"rows": [{"x": [1, 2, 1e39]}]}', b"[" * 100_000,
        b'{"rows": [{"x": [1, 2, true]}]}', orjson.dumps({"rows": [{"x": [1, 2, 3]}] * 5000}),
    ],
)  # fmt: skip
def test_wrong_plain_rows_are_refused(given: bytes) -> None:
    with pytest.raises(BadRequest):
        inquiry_of_rows(given, X)


def test_noise_is_refused_and_never_our_fault() -> None:
    """Good requests with a few bytes changed: they pass whole, or are refused."""
    chance = np.random.default_rng(5)
    good = [(body(), None), raw(12, RAW)]
    passed, tried = 0, 0
    while tried < 1000:
        given, header = good[tried % 2]
        noisy = np.frombuffer(given, np.uint8).copy()
        places = chance.integers(0, len(noisy), chance.integers(1, 4))
        noisy[places] = chance.integers(0, 256, len(places))
        quick = arrays_in(noisy.tobytes(), header and header.encode(), X)
        try:
            found = inquiry_of(noisy.tobytes(), X, ["output"], header)
        except BadRequest:
            assert quick is None
        else:
            passed += 1
            values = found.rows.column("x").combine_chunks().flatten().to_numpy()
            assert values.shape == (3,)
            assert np.isfinite(values).all()
        tried += 1
    assert 0 < passed < tried
