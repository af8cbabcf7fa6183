"""Encoded spans: what OpenTelemetry's own encoder makes of the same span, byte for byte parsed."""

import json
import math
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Tracer, TracerProvider
from opentelemetry.trace import SpanKind, StatusCode

from lepton.telemetry.bulk import FEW, MANY, MOST_BYTES, MOST_SHEETS, Bulk, apart
from lepton.telemetry.context import context_of, links_of
from lepton.telemetry.spans import _ended
from lepton.telemetry.wire import MOST_KEPT, MOST_TEXT, Common, Encoded, Encoder, Ended, request

RESOURCE = {"service.name": "lepton", "process.pid": 1, "long": "x" * 20_000}
PARENT = f"00-{'ab' * 16}-{'cd' * 8}-01"
LINK = f"00-{'12' * 16}-{'34' * 8}-01"

words = st.text(max_size=300).filter(lambda s: s.isprintable())
values = st.one_of(
    words,
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.lists(st.integers(-5, 5), min_size=1, max_size=4),
    st.lists(st.floats(0, 1), min_size=1, max_size=4),
)
attributes = st.dictionaries(words.filter(bool), values, max_size=6)


@pytest.fixture(scope="module")
def tracer() -> Tracer:
    found = TracerProvider(resource=Resource(RESOURCE), shutdown_on_exit=False).get_tracer("lepton")
    assert isinstance(found, Tracer)
    return found


def _made(tracer: Tracer, told: dict[str, Any], *, child: bool, error: str) -> ReadableSpan:
    span: Any = tracer.start_span(
        "lepton.request",
        context=context_of(PARENT) if child else Context(),
        kind=SpanKind.SERVER,
        start_time=2**60,
        links=links_of([LINK]) if child else [],
        attributes=told,
    )
    if error:
        span.set_attribute("error.type", error)
        span.set_status(StatusCode.ERROR, error)
    span.end(2**60 + 5)
    return span


@settings(max_examples=60, deadline=None)
@given(told=attributes, child=st.booleans(), error=st.sampled_from(["", "OSError"]))
def test_it_is_what_opentelemetry_makes_of_it(
    tracer: Tracer, told: dict[str, Any], child: bool, error: str
) -> None:
    span = _made(tracer, told, child=child, error=error)
    encoder = Encoder("p (1)")
    twice = [encoder.encode(_ended(span)) for _ in range(2)]  # the second from what was kept
    found = ExportTraceServiceRequest.FromString(request(RESOURCE, [e.message for e in twice]))
    wanted = encode_spans([span, span])

    for one in (found, wanted):  # attributes have no order
        for sent in one.resource_spans[0].scope_spans[0].spans:
            sent.attributes.sort(key=lambda a: a.key)
    assert found == wanted
    line = json.loads(twice[1].line)
    assert line["parent_id"] == ("cd" * 8 if child else None)
    assert line["end_ns"] - line["start_ns"] == 5
    assert line["status"] == ("error" if error else "ok")
    assert line["attributes"] == {**told, **({"error.type": error} if error else {})}
    assert line["links"] == (["12" * 16 + ":" + "34" * 8] if child else [])


hexes = st.integers(0, 2**64 - 1).map("{:016x}".format)
ids = st.tuples(hexes, hexes, hexes, st.one_of(st.just(""), hexes))


@settings(max_examples=60, deadline=None)
@given(
    told=attributes,
    spans=st.lists(ids, max_size=5 * FEW),
    start=st.integers(10**17, 2**62) | st.integers(10**18, 2 * 10**18),
    sent=st.booleans(),
    most=st.sampled_from([FEW + 1, MANY]),
)
def test_many_at_once_are_what_each_would_be(
    told: dict[str, Any], spans: list[tuple[str, ...]], start: int, sent: bool, most: int
) -> None:
    common = Common("lepton.request", "server", "", [LINK], {"percent %s": "100%", **told})
    other = Common("lepton.batch")
    flat: list[Any] = []
    for n, (high, low, own, parent) in enumerate(spans):
        above = parent and f"00-{high}{low}-{parent}-01"
        times = start + n, start + 2 * n - (n % 5 == 4) * 3 * n  # some clocks are put back
        flat += (other if n % 7 == 6 else common, f"00-{high}{low}-{own}-01", above, *times)
    parts = apart(flat, most)
    encoder = Encoder("p (1)")
    bulk = Bulk(encoder)
    for part in parts:
        bulk.encode(part.some(range(len(part) // 2)), sent=sent)  # others have used the sheets
    encoded = [bulk.encode(part, sent=sent) for part in parts]
    found = Encoded(b"".join(e.line for e in encoded), b"".join(e.message for e in encoded))
    each = [encoder.encode(span, sent=sent) for part in parts for span in part.spans()]

    assert all(len(part) <= most for part in parts)
    assert sum(map(len, parts)) == len(spans)
    assert sorted(found.line.splitlines()) == sorted(e.line[:-1] for e in each)
    read = ExportTraceServiceRequest.FromString(request({}, [found.message]))
    wanted = ExportTraceServiceRequest.FromString(request({}, [e.message for e in each]))
    shown = [
        sorted(s.SerializeToString() for s in one.resource_spans[0].scope_spans[0].spans)
        for one in (read, wanted)
    ]
    assert shown[0] == shown[1]
    assert len(shown[0]) == (len(spans) if sent else 0)


def test_sheets_are_bounded_in_number_and_size() -> None:
    bulk = Bulk(Encoder("p (1)"))
    for n in range(3 * MOST_SHEETS):
        common = Common("x", attributes={"url.path": "/" * (MOST_BYTES * (n % 2) + n)})
        flat: list[Any] = [common, f"00-{n:032x}-{n:016x}-01", "", 10**18, 10**18 + n] * FEW
        (part,) = apart(flat)
        lines = bulk.encode(part).line.splitlines()
        assert [json.loads(line)["attributes"] for line in lines] == [common.attributes] * FEW
        assert 0 < len(bulk._sheets) <= MOST_SHEETS
        assert all(len(key[0].attributes["url.path"]) < MOST_BYTES for key in bulk._sheets)


def test_what_is_kept_is_bounded_and_tells_kinds_apart() -> None:
    encoder = Encoder("p (1)")
    ids = ("ab" * 16, "cd" * 8, "")

    def encoded(value: object) -> Any:
        span = Ended(Common("x", attributes={"a": value}), *ids, 1, 2)
        sent = ExportTraceServiceRequest.FromString(request({}, [encoder.encode(span).message]))
        return sent.resource_spans[0].scope_spans[0].spans[0].attributes[0].value

    assert [encoded(v).WhichOneof("value") for v in (1, True, 1.0)] == [
        "int_value", "bool_value", "double_value",
    ]  # fmt: skip
    assert encoded(float("inf")).double_value == -encoded(float("-inf")).double_value == math.inf
    for n in range(3 * MOST_KEPT):
        assert encoded(n).int_value == n
    assert len(encoder._kept) <= MOST_KEPT
    kept = dict(encoder._kept)
    assert encoded("ä" * 3 * MOST_TEXT).string_value == "ä" * MOST_TEXT
    assert encoder._kept == kept
    whole = encoder.encode(Ended(Common("x", attributes={"a": "ä" * 3 * MOST_TEXT}), *ids, 1, 2))
    assert json.loads(whole.line)["attributes"]["a"] == "ä" * 3 * MOST_TEXT
