"""The page: complete, escaped, self-contained, whatever it is given."""

import math
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from lepton.report import Fault, LossPoint, Report, Sample, Span, Stage, render
from lepton.report.timeline import COLLAPSE, quantile, rows_of

VOID = {"meta", "rect", "line", "br"}


class Balance(HTMLParser):
    """Fails when a tag is closed that was not opened last."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass


def span(number: int, parent: int | None, name: str = "s", *, start: int = 0, end: int = 1) -> Span:
    return Span(
        name=name,
        span_id=str(number),
        parent_id=None if parent is None else str(parent),
        trace_id="t",
        start_ns=start,
        end_ns=end,
        process="p",
    )


def page(**parts: object) -> str:
    return render(Report(title="a title", subtitle="", trace_id="t", **parts))  # type: ignore[arg-type]


def test_a_full_page_is_balanced_and_needs_no_network() -> None:
    html = page(
        spans=[span(1, None), span(2, 1, end=5), span(3, 9, "lost")],
        losses=[LossPoint(step=n, loss=1 / n, world_size=2, attempt=n // 9) for n in range(1, 20)],
        faults=[Fault(step=8, label="killed")],
        stages=[Stage(name="table", figures={"rows": "7"})],
        samples=[Sample(pixels=[[0.0, 1.0]], label="3", answer="8", score=0.5)],
        confusion=[[3, 0], [1, 2]],
        labels=["a", "b"],
    )
    balance = Balance()
    balance.feed(html)

    assert balance.open == []
    for outside in ("http:", "https:", "@import", "src=", "url("):
        assert outside not in html
    assert "life 1: steps 1 to 8" in html
    assert "killed, step 8" in html
    assert "✗ is 3" in html


def test_what_comes_from_outside_is_escaped() -> None:
    evil = "<script>alert('x')</script>"
    noisy = Span(
        name=evil,
        span_id="1",
        parent_id=None,
        trace_id=evil,
        start_ns=0,
        end_ns=1,
        process=evil,
        attributes={evil: evil},
        links=[evil],
    )
    html = render(
        Report(
            title=evil,
            subtitle=evil,
            trace_id=evil,
            spans=[noisy],
            losses=[LossPoint(step=1, loss=1, world_size=1, attempt=0)],
            faults=[Fault(step=1, label=evil)],
            stages=[Stage(name=evil, figures={evil: evil})],
            samples=[Sample(pixels=[], label=evil, answer=evil, score=0)],
            confusion=[[1]],
            labels=[evil],
        )
    )

    assert "<script" not in html


def test_nothing_at_all_is_still_a_page() -> None:
    assert "No spans were recorded" in page()
    assert "No steps were recorded" in page(
        losses=[LossPoint(step=1, loss=math.nan, world_size=1, attempt=0)]
    )


def test_many_spans_of_a_name_share_a_row_with_their_quantiles() -> None:
    many = [span(n, 1, "request", start=n, end=n + n * 1_000_000) for n in range(2, 402)]
    rows = rows_of([span(1, None, "root"), *many])

    assert [(r.name, len(r.spans), r.depth) for r in rows] == [("root", 1, 0), ("request", 400, 1)]
    assert rows[1].caption == "400 spans, p50 201 ms, p99 397 ms"
    assert quantile([1.0], 0.99) == 1.0


def test_a_span_without_its_parent_is_shown_as_an_orphan() -> None:
    rows = rows_of([span(1, None), span(2, 77)])

    assert [(r.spans[0].span_id, r.orphan) for r in rows] == [("1", False), ("2", True)]


@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.none() | st.integers(0, 30), st.sampled_from("ab")),
        max_size=40,
        unique_by=lambda t: t[0],
    )
)
def test_every_span_is_on_the_page_once(tree: list[tuple[int, int | None, str]]) -> None:
    spans = [span(number, parent, name) for number, parent, name in tree]
    rows = rows_of(spans)
    shown = [s.span_id for r in rows for s in r.spans]

    assert sorted(shown) == sorted(s.span_id for s in spans)
    assert all(len(r.spans) == 1 or len(r.spans) >= COLLAPSE for r in rows)
    assert page(spans=spans)
