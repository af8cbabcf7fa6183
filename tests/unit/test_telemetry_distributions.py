"""Histograms: the same points as OpenTelemetry's SDK makes of the same values."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.context import Context
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource

from lepton.telemetry import distributions
from lepton.telemetry.distributions import MANY, Distributions
from lepton.telemetry.instruments import INSTRUMENTS

WHAT = INSTRUMENTS["http.server.request.duration"]
SAMPLED = f"00-{'ab' * 16}-{'cd' * 8}-01"
UNSAMPLED = f"00-{'12' * 16}-{'34' * 8}-00"


def points(found: Any) -> dict[frozenset[Any], Any]:
    (metric,) = found.resource_metrics[0].scope_metrics[0].metrics
    assert (metric.name, metric.unit) == (WHAT.name, "s")
    return {frozenset(p.attributes.items()): p for p in metric.data.data_points}


@given(
    st.lists(
        st.tuples(
            st.one_of(st.floats(0, 200), st.sampled_from(WHAT.bounds)), st.sampled_from("ab")
        ),
        min_size=1,
    )
)
def test_points_are_those_of_the_sdk(values: list[tuple[float, str]]) -> None:
    reader = InMemoryMetricReader()
    meter = MeterProvider([reader], shutdown_on_exit=False).get_meter("lepton")
    theirs = meter.create_histogram(
        WHAT.name, "s", explicit_bucket_boundaries_advisory=list(WHAT.bounds)
    )
    ours = Distributions(delta=False)
    for value, model in values:
        theirs.record(value, {"lepton.model": model}, Context())
        ours.take(WHAT, value, {"lepton.model": model}, "")

    found, expected = points(ours.collect(Resource({}))), points(reader.get_metrics_data())
    assert set(found) == set(expected)
    for key, point in expected.items():
        for name in ("count", "sum", "min", "max"):
            assert getattr(found[key], name) == pytest.approx(getattr(point, name))
        assert list(found[key].bucket_counts) == list(point.bucket_counts)
        assert list(found[key].explicit_bounds) == list(point.explicit_bounds)


def test_a_bucket_has_its_last_sampled_trace_as_an_example_once() -> None:
    ours = Distributions(delta=False)
    for value, trace in ((0.002, SAMPLED), (0.0021, SAMPLED), (0.002, UNSAMPLED), (0.2, "")):
        ours.take(WHAT, value, {}, trace)
    (point,) = points(ours.collect(Resource({}))).values()
    (again,) = points(ours.collect(Resource({}))).values()

    (example,) = point.exemplars
    assert (f"{example.trace_id:032x}", f"{example.span_id:016x}") == ("ab" * 16, "cd" * 8)
    assert example.value == 0.0021
    assert again.count == point.count == 4
    assert again.exemplars == []


def test_delta_begins_anew() -> None:
    ours = Distributions(delta=True)
    assert ours.collect(Resource({})) is None
    ours.take(WHAT, 1, {}, "")
    (first,) = points(ours.collect(Resource({}))).values()
    assert ours.collect(Resource({})) is None
    ours.take(WHAT, 2, {}, "")
    (second,) = points(ours.collect(Resource({}))).values()

    assert (first.count, second.count, second.sum) == (1, 1, 2)
    assert second.start_time_unix_nano >= first.time_unix_nano


def test_labels_without_end_are_added_up_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributions, "MOST_SERIES", 3)
    ours = Distributions(delta=False)
    for n in range(10):
        ours.take(WHAT, n, {"lepton.version": n}, "")
    found = points(ours.collect(Resource({})))

    assert len(found) == 4
    assert found[frozenset({("otel.metric.overflow", True)})].count == 7


@given(
    st.lists(
        st.one_of(st.floats(0, 200), st.sampled_from(WHAT.bounds)), min_size=MANY, max_size=3 * MANY
    )
)
def test_many_at_once_are_what_each_would_be(values: list[float]) -> None:
    one_by_one, at_once = Distributions(delta=False), Distributions(delta=False)

    def trace_of(at: int) -> str:
        return f"00-{'ab' * 16}-{at + 1:016x}-01"

    for at, value in enumerate(values):
        one_by_one.take(WHAT, value, {}, trace_of(at))
    at_once.take_all(WHAT, values, {}, trace_of)

    (wanted,) = points(one_by_one.collect(Resource({}))).values()
    (found,) = points(at_once.collect(Resource({}))).values()
    assert list(found.bucket_counts) == list(wanted.bucket_counts)
    assert (found.min, found.max) == (wanted.min, wanted.max)
    assert found.sum == pytest.approx(wanted.sum)
    assert {(e.value, e.span_id) for e in found.exemplars} == {
        (e.value, e.span_id) for e in wanted.exemplars
    }
