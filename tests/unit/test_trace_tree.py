"""A trace as lines and as Chrome trace events, whatever spans it has."""

import json
from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from lepton.report import Span
from lepton.report.perfetto import perfetto, threads_of
from lepton.report.tree import summary, tree


def span(number: int, parent: int | None = None, name: str = "s", **more: object) -> Span:
    fields: dict[str, object] = {"start_ns": number, "end_ns": number + 1, "process": "p", **more}
    return Span(
        name=name,
        span_id=str(number),
        parent_id=None if parent is None else str(parent),
        trace_id="t",
        **fields,  # type: ignore[arg-type]
    )


def test_draws_children_under_their_parents() -> None:
    lost = {"error.type": "WorkerLost", "lepton.step": 91}
    lines = tree(
        [
            span(1, name="root", end_ns=2_000_000_001),
            span(2, 1, "train", attributes={"lepton.run": "r", "lepton.rank": 3}),
            span(3, 2, "failure", status="error", attributes=lost),
            span(4, 1, "use", process="q", attributes={"lepton.unfinished": True}),
            span(5, 77, "lost"),
        ]
    )

    assert [(line.branch, line.name) for line in lines] == [
        ("", "root"),
        ("├─ ", "train"),
        ("│  └─ ", "failure"),
        ("└─ ", "use"),
        ("", "lost"),
    ]
    assert [line.facts for line in lines] == ["p", "p, run r, rank 3", "p, step 91", "q", "p"]
    assert [line.trouble for line in lines] == [
        *("", "", "WorkerLost", "not ended"),
        "its parent was not recorded",
    ]
    assert str(lines[0]).split() == ["+0.000", "s", "2.0", "s", "root", "p"]
    assert "✗ WorkerLost" in str(lines[2])


def test_many_siblings_are_one_line_with_their_failures() -> None:
    many = [
        span(n, 1, "request", end_ns=n + n * 1_000_000, status="error" if n == 9 else "ok")
        for n in range(2, 402)
    ]
    lines = tree([span(1, name="root"), *many])

    assert [line.name for line in lines] == ["root", "request x400"]
    assert lines[1].facts == "p50 201 ms, max 401 ms, p"
    assert lines[1].trouble == "1 failed: failed"
    assert summary(many).startswith("400 spans (1 failed) of 1 processes, 401 ms from 1970-01-01")


TREES = st.lists(
    st.tuples(
        st.integers(0, 30),
        st.none() | st.integers(0, 30),
        st.sampled_from("ab"),
        st.integers(0, 20),
        st.integers(0, 20),
    ),
    max_size=30,
    unique_by=lambda t: t[0],
)


@given(TREES)
def test_every_event_is_what_the_format_asks_for(
    found: list[tuple[int, int, str, int, int]],
) -> None:
    spans = [
        span(number, parent, process=process, start_ns=at, end_ns=at + took, links=("t:3", "u:4"))
        for number, parent, process, at, took in found
    ]
    body = json.loads(json.dumps(perfetto(spans, "t", {"loss": [(5, 0.5)]})))
    phases = defaultdict(list)
    for event in body["traceEvents"]:
        phases[event["ph"]].append(event)
        assert isinstance(event["pid"], int)
        assert event["ph"] == "M" or event["ts"] >= 0 or event["ph"] == "C"

    assert set(phases) <= {"M", "X", "C", "s", "f", "i"}
    assert sorted(e["args"]["span_id"] for e in phases["X"]) == sorted(s.span_id for s in spans)
    assert all(e["dur"] >= 0 and e["name"] and isinstance(e["tid"], int) for e in phases["X"])
    assert sorted(e["id"] for e in phases["s"]) == sorted(e["id"] for e in phases["f"])
    named = {(e["pid"], e["tid"]) for e in phases["M"] if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in phases["X"]} == named


@given(TREES)
def test_spans_of_a_thread_lie_within_each_other_or_apart(
    found: list[tuple[int, int, str, int, int]],
) -> None:
    spans = [span(n, start_ns=at, end_ns=at + took) for n, _, _, at, took in found]
    threads = threads_of(spans)

    assert sorted(s.span_id for t in threads for s in t) == sorted(s.span_id for s in spans)
    for thread in threads:
        for a in thread:
            for b in thread:
                if a.start_ns <= b.start_ns < a.end_ns:
                    assert b.end_ns <= a.end_ns or a.start_ns == b.start_ns


def test_marks_a_loss_and_shows_times_in_microseconds() -> None:
    begin = 1_795_241_995_000_000_000
    spans = [
        span(1, name="lepton.train", start_ns=begin, end_ns=begin + 3_000_500),
        span(2, 1, "lepton.train.failure", start_ns=begin + 1_000, end_ns=begin + 2_000),
        span(3, 1, start_ns=begin + 2_500, end_ns=begin + 2_600, links=("t:2",)),
    ]
    body = perfetto(spans, "t")
    marks = [e for e in body["traceEvents"] if e["ph"] == "i"]
    slices = {e["args"]["span_id"]: e for e in body["traceEvents"] if e["ph"] == "X"}
    arrows = [(e["ph"], e["ts"]) for e in body["traceEvents"] if e["ph"] in "sf"]

    assert [(e["ts"], e["name"]) for e in marks] == [(1.0, "a worker was lost")]
    assert (slices["1"]["ts"], slices["1"]["dur"]) == (0.0, 3000.5)
    assert arrows == [("s", 1.0), ("f", 2.5)]
    assert body["otherData"] == {"trace_id": "t", "begin_unix_ns": str(begin)}
