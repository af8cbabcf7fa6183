"""A trace's page: complete, escaped, self-contained; the picture by process and over time."""

from hypothesis import given
from hypothesis import strategies as st

from lepton.report import Span
from lepton.report.lanes import MOST_NAME, MOST_ROWS, killed, lanes, lanes_of, speed
from lepton.report.outline import MOST, outline
from lepton.report.timeline import apart
from lepton.report.tracepage import TracePage, render_trace
from tests.unit.test_report import Balance

SECOND = 1_000_000_000


def span(number: int, start: float, end: float, name: str = "s", **more: object) -> Span:
    fields: dict[str, object] = {"process": "p", "parent_id": None, **more}
    return Span(
        name=name,
        span_id=str(number),
        trace_id=str(fields.pop("trace_id", "t")),
        start_ns=int(start * SECOND),
        end_ns=int(end * SECOND),
        **fields,  # type: ignore[arg-type]
    )


def run() -> list[Span]:
    lost = {"lepton.step": 91, "lepton.world_size": 1, "lepton.steps_replayed": 0}
    return [
        span(1, 0, 10, "lepton.train", process="driver"),
        span(2, 1, 4, "lepton.steps", attributes={"lepton.rank": 0}),
        span(3, 4, 5, "lepton.train.failure", status="error", attributes=lost),
        span(4, 6, 6.5, "lepton.train.resize", attributes=lost),
        span(5, 7, 8, "lepton.checkpoint", attributes={"lepton.step": 192}),
    ]


def served(trace_id: str) -> Span:
    about = {"lepton.model": "m", "lepton.version": 2}
    return span(9, 20, 21, "lepton.request", trace_id=trace_id, links=("t:5",), attributes=about)


def page(**parts: object) -> str:
    html = render_trace(TracePage(title="run r", trace_id="t", **parts))  # type: ignore[arg-type]
    balance = Balance()
    balance.feed(html)
    assert balance.open == []
    for outside in ("http:", "https:", "@import", "src=", "url(", "<script"):
        assert outside not in html
    return html


def test_a_run_is_shown_with_its_losses_and_who_it_serves() -> None:
    curve = [(SECOND, 2.0), (8 * SECOND, 0.5)]
    html = page(spans=run(), linking=[served("u")], curves={"loss": curve}, facts={"table": "t@3"})

    assert "p, rank 0" in html
    assert "a worker was lost: no step for 1.0 s, then 1 workers" in html
    assert "<td>+6.0 s</td><td>workers changed</td><td>91</td><td>500 ms</td>" in html
    assert "lepton.request (m version 2)" in html
    assert "trace u</td><td>lepton.checkpoint at step 192 of this trace" in html
    assert "While it trained" not in html
    assert "<td>t@3</td>" in html


def test_steps_that_are_a_small_part_have_a_picture_of_their_own() -> None:
    html = page(spans=[*run(), served("t")], curves={"loss": [(SECOND, 2.0), (8 * SECOND, 0.5)]})

    assert "While it trained" in html
    assert html.count("<polyline") == 1
    assert html.count('class="stop loss"') == 2


def test_a_link_to_what_is_not_here_is_still_told() -> None:
    html = page(spans=[span(1, 0, 1, links=("far:7",))])

    assert "a span that is not here of trace far" in html


def test_nothing_and_strange_names_make_a_page() -> None:
    evil = "<script>alert('x')</script>"
    noisy = span(1, 0, 100, evil, process=evil, links=[evil], attributes={evil: evil})

    assert "No spans were recorded" in page(spans=[])
    page(
        spans=[noisy],
        linking=[served(evil)],
        facts={evil: evil},
        curves={evil: [(0, float("nan"))]},
    )


@given(
    st.lists(st.tuples(st.sampled_from("pq"), st.integers(0, 20), st.integers(0, 20)), max_size=40)
)
def test_every_span_is_in_its_process_once(found: list[tuple[str, int, int]]) -> None:
    spans = [span(n, at, at + took, process=p) for n, (p, at, took) in enumerate(found)]
    drawn = [s.span_id for lane in lanes_of(spans) for row in lane.rows for s in row]

    assert sorted(drawn) == sorted(s.span_id for s in spans)
    assert all(len(lane.rows) <= MOST_ROWS for lane in lanes_of(spans))
    assert lanes(spans).count("<rect") <= len(spans)


def test_a_page_stays_small_whatever_the_number_of_requests() -> None:
    root = span(0, 0, 60, "lepton.use")
    many = [
        span(
            n,
            n / 500,
            n / 500 + 0.001,
            "lepton.request",
            parent_id="0",
            status="error" if n == 7000 else "ok",
        )
        for n in range(1, 20_001)
    ]
    html = page(spans=[root, *many])

    assert "20000&nbsp;spans, p50&nbsp;1.0&nbsp;ms" in html
    assert html.count('class="span failed"') == html.count('class="bar failed"') == 1
    assert len(html) < 2_000_000


def test_only_bars_that_lie_on_each_other_are_left_out() -> None:
    row = [span(1, 0, 10), span(2, 3, 4), span(3, 10.1, 10.2), span(4, 12, 12.1)]

    assert [s.span_id for s in apart(row, 0)] == ["1", "3", "4"]
    assert [s.span_id for s in apart(row, SECOND)] == ["1", "4"]


def test_speed_counts_every_row_but_the_first_step() -> None:
    times = [n * SECOND for n in range(1, 201)]
    found = speed(times, [50] * 200, buckets=20)

    assert {round(v, 6) for _, v in found} == {50.0}
    assert found[-1][0] <= times[-1]
    assert speed([SECOND], [50]) == []


def workers(*, resized: bool = False) -> list[Span]:
    """Two workers; the second makes no step after the failure at 10 s."""
    other = [span(6, 8, 8.5, "lepton.train.resize")] if resized else []
    return [
        span(1, 0, 30, "lepton.train", process="driver"),
        *(span(10 + n, n * 5, n * 5 + 5, "lepton.steps", process="a (1)") for n in range(6)),
        span(20, 0, 5, "lepton.steps", process="b (2)"),
        span(21, 5, 7 if resized else 9.9, "lepton.steps", process="b (2)"),
        span(5, 10, 12, "lepton.train.failure", status="error"),
        *other,
    ]


def test_the_process_that_was_lost_is_marked() -> None:
    spans = workers()
    html = page(spans=spans)

    assert [(s.span_id, process) for s, process in killed(spans)] == [("21", "b (2)")]
    assert html.count('class="killed"') == html.count("b (2) was lost here") == 1
    assert "the process that was lost" in html


def test_a_process_that_left_or_ended_with_all_was_not_lost() -> None:
    assert killed(workers(resized=True)) == []
    assert killed([s for s in workers() if s.process != "a (1)"]) == []
    assert killed([s for s in workers() if s.name != "lepton.train.failure"]) == []
    assert killed([]) == []


def test_long_names_keep_what_tells_processes_apart() -> None:
    names = [f"RayTrainWorker.with_a_long_name_{n} ({n})" for n in (1000, 1001)]
    spans = [
        span(n, 0, 1, process=name, attributes={"lepton.rank": n}) for n, name in enumerate(names)
    ]
    html = lanes(spans)

    for n, name in enumerate(names):
        assert f"({1000 + n}), rank {n}<title>{name}, rank {n}</title>" in html
    assert all(
        len(shown.split("<")[0]) <= MOST_NAME + 1 for shown in html.split('">')[1:] if "…" in shown
    )


def test_what_happened_is_told_in_a_few_lines() -> None:
    steps = span(
        10, 4, 8, "lepton.steps", attributes={"lepton.rank": 1, "lepton.input_wait_s": 0.8}
    )
    within = span(11, 1, 2, "lepton.evaluate", parent_id="1")
    about = {"lepton.rank": 1, "lepton.step": 7}
    slow = [span(12 + n, n, n * 2, "lepton.slow_step", attributes=about) for n in (1, 2)]
    everything = [*run(), steps, within, *slow]
    told = outline(everything, [served("other")])
    assert told == {
        "time went to": "train 10.0 s (100 %)",
        "steps waited": "for batches, 11 % of their time",
        "slow steps": "2, the slowest at +2.0 s: step 7 on rank 1 took 2.0 s",
        "workers lost": "1, at +4.0 s; no step for 1.0 s; no steps made again",
        "resized": "once, to 1 worker, at +6.0 s; no step for 500 ms",
        "served": "1 request by m version 2: p50 1.0 s, p99 1.0 s, none failed",
    }
    assert outline([]) == {}
    for text in told.values():
        assert text in page(spans=everything, linking=[served("other")])


def test_of_many_things_a_few_are_told_and_the_rest_is_counted() -> None:
    failed = [
        span(n, n, n + 1, f"lepton.{n % 6}", status="error", attributes={"error.type": "OSError"})
        for n in range(12)
    ]
    lost = [span(100 + n, n, n + 1, "lepton.train.failure", status="error") for n in range(9)]
    wrong = [
        span(n, 0, 1, "lepton.request", status="error", attributes={"error.type": "X"})
        for n in range(200, 203)
    ]
    told = outline([*failed, *lost, *wrong])
    assert told["else failed"].startswith("2 times 0 (OSError); 2 times 1")
    assert told["else failed"].endswith(f"; and {6 - MOST} more")
    assert (
        "9, at +0.0 ms, +1.0 s, +2.0 s, +3.0 s, …; no step for 9.0 s in all" in told["workers lost"]
    )
    assert told["served"].endswith("3 failed (X)")
