"""Baggage: whatever is said arrives, whatever comes in is survived, limits hold."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton import telemetry
from lepton.telemetry import Carrier, carrier_of
from lepton.telemetry.baggage import MOST_BYTES, MOST_ENTRIES, entries_of, header_of

KEYS = st.text("abc019._-!", min_size=1, max_size=20)
WORDS = st.text(st.characters(codec="utf-8"), max_size=40)


@given(st.dictionaries(KEYS, WORDS, max_size=10))
def test_every_word_arrives_in_a_header_that_any_server_takes(words: dict[str, str]) -> None:
    header = header_of(words)

    assert entries_of(header) == words
    assert re.fullmatch(r"[\x21\x23-\x5b\x5d-\x7e]*", header)


@given(st.dictionaries(KEYS, st.text("aü, ", max_size=8), max_size=100))
def test_the_limits_hold(words: dict[str, str]) -> None:
    header = header_of(words)

    assert len(header) <= MOST_BYTES
    assert len(entries_of(header)) == min(len(words), MOST_ENTRIES)


def test_what_is_too_long_is_left_out_from_its_beginning_on() -> None:
    assert entries_of(header_of({"a": 1, "b": "x" * MOST_BYTES, "c": 2})) == {"a": "1"}


@given(st.text(max_size=200))
def test_any_header_is_survived(header: str) -> None:
    assert header_of(entries_of(header)).count(",") <= header.count(",")


def test_properties_and_malformed_members_are_left_out() -> None:
    assert entries_of("a=1;p=q, b = 2 ,nothing,=3,c%=4,ä=5") == {"a": "1", "b": "2", "c%": "4"}


def test_a_key_that_no_header_can_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="baggage key 'a b'"):
        header_of({"a b": 1})


def test_it_goes_along_with_spans(tmp_path: Path) -> None:
    asked = carrier_of(f"00-{'ab' * 16}-{'cd' * 8}-01", str(tmp_path), baggage="lepton.run=digits")
    with telemetry.span("outer", asked.with_baggage({"lepton.version": 3})) as outer:
        inner = telemetry.record("inner", outer.carrier, 1, 2)

    assert inner.headers == {
        "traceparent": inner.traceparent,
        "baggage": "lepton.run=digits,lepton.version=3",
    }
    assert Carrier().headers == {}
    beside = carrier_of(f"00-{'ab' * 16}-{'cd' * 8}-01", None, tracestate="vendor=1")
    with telemetry.span("outer", beside) as outer:
        assert outer.carrier.headers["tracestate"] == "vendor=1"
    assert carrier_of("bad", None, tracestate="vendor=1").tracestate == ""
    assert Carrier(tracestate="vendor=1").headers == {}
    assert carrier_of("bad", None, baggage="lepton.run=digits").baggage == ""
