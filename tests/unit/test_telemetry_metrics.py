"""Metrics: a frozen table, off by default, exact sums, exemplars, and windows of steps."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton import telemetry
from lepton.telemetry import Carrier, Common, Pace, Paced, delivery, metrics, pace, spool
from lepton.telemetry.conventions import strays
from lepton.telemetry.instruments import INSTRUMENTS
from lepton.telemetry.rounds import rounds
from tests.unit.collector import Collector, attributes_of

TABLE = """
http.server.request.duration histogram s
hw.gpu.memory.usage gauge By
hw.gpu.utilization gauge 1
lepton.answers.dropped counter {answer}
lepton.answers.waiting gauge {answer}
lepton.checkpoint.age gauge s
lepton.checkpoint.duration histogram s
lepton.checkpoint.size counter By
lepton.disagreement gauge 1
lepton.drift gauge 1
lepton.model.load.duration histogram s
lepton.read.rows counter {row}
lepton.read.size counter By
lepton.serving.alive gauge s
lepton.serving.batch_size histogram {row}
lepton.serving.queue_depth gauge {request}
lepton.serving.request.rows histogram {row}
lepton.serving.rollbacks gauge {rollback}
lepton.serving.share gauge 1
lepton.telemetry.dropped counter {item}
lepton.train.failures counter {failure}
lepton.train.goodput gauge 1
lepton.train.input_wait counter s
lepton.train.recovery.duration histogram s
lepton.train.rows counter {row}
lepton.train.rows_per_second gauge {row}/s
lepton.train.step.duration histogram s
lepton.train.steps counter {step}
lepton.train.steps_replayed counter {step}
lepton.train.stragglers counter {worker}
lepton.train.world_size gauge {worker}
"""

MEASURED = """
from lepton import telemetry
trace = telemetry.Carrier("00-" + "ab" * 16 + "-" + "cd" * 8 + "-01")
pace = telemetry.Pace(trace)
for n in range(100):
    at = n * 2_000_000
    pace.add(telemetry.Paced(n + 1, at, at + 500_000, at + 2_000_000, 32, (0, 2)))
pace.close()
labels = {"lepton.model": "m", "http.response.status_code": 200}
telemetry.measure("http.server.request.duration", 0.003, labels, trace=trace.traceparent)
telemetry.measure("lepton.answers.dropped", 2, {"lepton.model": "m"})
telemetry.flush()
import sys
assert "ray" not in sys.modules and "torch" not in sys.modules
"""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What a process measures into is settled once; each test is a process of its own."""
    metrics._state.__init__()
    yield
    metrics._state.__init__()


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.close()


def test_the_table_of_instruments_is_this() -> None:
    table = [f"{i.name} {i.kind} {i.unit}" for i in INSTRUMENTS.values()]

    assert sorted(table) == TABLE.split("\n")[1:-1]
    assert all(bool(i.bounds) == (i.kind == "histogram") for i in INSTRUMENTS.values())
    assert not any("trace" in a or "run" in a for i in INSTRUMENTS.values() for a in i.attributes)


def test_nothing_is_measured_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_METRICS_EXPORTER"):
        monkeypatch.delenv(name, raising=False)

    telemetry.measure("lepton.train.rows", 1)
    assert not telemetry.measuring()


class Board:
    """Keeps what is put up, and refuses what Ray's does: a counter that does not grow."""

    def __init__(self) -> None:
        self.put: list[tuple[Any, ...]] = []

    def Counter(self, name: str, description: str, tag_keys: Any) -> Any:  # noqa: N802 - Ray's
        return self._made("inc", name, tag_keys)

    def Gauge(self, name: str, description: str, tag_keys: Any) -> Any:  # noqa: N802 - Ray's
        return self._made("set", name, tag_keys)

    def Histogram(  # noqa: N802
        self, name: str, description: str, boundaries: Any, tag_keys: Any
    ) -> Any:
        return self._made("observe", name, tag_keys)

    def _made(self, call: str, name: str, tag_keys: Any) -> Any:
        def take(value: float, tags: dict[str, str]) -> None:
            assert tuple(tags) == tag_keys
            if value < 0 or (call == "inc" and value == 0):
                raise ValueError("refused")
            self.put.append((name, value, tags))

        return SimpleNamespace(**{call: take})


def test_a_board_gets_plain_names_and_every_label(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board()
    telemetry.scrape_by(board)
    assert not telemetry.measuring()  # nobody has asked for it

    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "prometheus")
    telemetry.scrape_by(board)
    telemetry.scrape_by(Board())
    telemetry.measure("lepton.answers.dropped", 2, {"lepton.model": "m"})
    telemetry.measure("lepton.train.rows", 0)
    telemetry.measure("lepton.train.world_size", 0)
    telemetry.measure("lepton.train.recovery.duration", 0.5)

    assert board.put == [
        ("lepton_answers_dropped", 2, {"lepton_model": "m"}),
        ("lepton_train_world_size", 0, {}),
        ("lepton_train_recovery_duration", 0.5, {"lepton_cause": ""}),
    ]


def test_a_board_that_refuses_stops_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "prometheus")
    telemetry.scrape_by(Board())
    telemetry.measure("lepton.checkpoint.age", -1)
    telemetry.measure("lepton.checkpoint.age", -1)

    assert [r.getMessage() for r in caplog.records] == [
        "telemetry: cannot measure lepton.checkpoint.age; this process measures no more there"
    ]
    assert not telemetry.measuring()


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, True),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://x"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_METRICS_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_METRICS_EXPORTER": "otlp"}, True),
        ({"OTEL_METRICS_EXPORTER": "prometheus"}, False),
        ({"OTEL_METRICS_EXPORTER": "prometheus, otlp"}, True),
    ],
)
def test_the_standard_variables_are_obeyed(
    variables: dict[str, str], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert telemetry.settings.otlp("metrics") == wanted


def test_metrics_reach_a_collector_with_exact_sums_and_exemplars(collector: Collector) -> None:
    command = [sys.executable, "-c", MEASURED]
    subprocess.run(command, env=collector.environment(), check=True, timeout=180)

    found = collector.metrics()
    assert _sum(found["lepton.train.rows"]) == 3200
    assert _sum(found["lepton.train.steps"]) == 100
    assert _sum(found["lepton.answers.dropped"]) == 2
    assert _sum(found["lepton.train.input_wait"]) == pytest.approx(0.05)
    assert found["lepton.train.world_size"].gauge.data_points[0].as_int == 2
    assert found["lepton.train.rows_per_second"].gauge.data_points[0].as_double == 16_000
    steps = found["lepton.train.step.duration"]
    assert steps.histogram.data_points[0].count == 100
    assert steps.unit == "s"
    answered = found["http.server.request.duration"].histogram.data_points[0]
    assert attributes_of(answered) == {"lepton.model": "m", "http.response.status_code": 200}
    examples = [
        e.trace_id.hex()
        for m in collector.collections()
        if m.name == "http.server.request.duration"
        for e in m.histogram.data_points[0].exemplars
    ]
    assert examples == ["ab" * 16]
    (window,) = collector.spans()
    assert window.name == "lepton.steps"
    assert window.trace_id.hex() == "ab" * 16


def _sum(metric: Any) -> float:
    (point,) = metric.sum.data_points
    return point.as_int or point.as_double


def test_windows_hold_every_step_once(tmp_path: Path) -> None:
    gathered = Pace(Carrier("", str(tmp_path)))
    second = 10**9
    ahead = time.time_ns() + 10**13  # no window is over yet by the clock
    for n in range(1, 25):  # two windows of 5 s, then one of another world size
        place = (1, 4 if n <= 20 else 3)
        begun = ahead + n * second // 2
        gathered.add(Paced(n, begun, begun + 10**6 * n, begun + second // 2, 8, place))
    gathered.close()
    gathered.close()

    windows = telemetry.spans_of(str(tmp_path))
    told = [dict(w.attributes) for w in windows]
    assert [t["lepton.steps"] for t in told] == [10, 10, 4]
    assert [t["lepton.step"] for t in told] == [10, 20, 24]
    assert [t["lepton.world_size"] for t in told] == [4, 4, 3]
    assert sum(t["lepton.rows"] for t in told) == 24 * 8
    assert sum(t["lepton.input_wait_s"] for t in told) == pytest.approx(sum(range(25)) / 1000)
    assert windows[0].end_ns - windows[0].start_ns == 5 * second


def test_a_step_far_slower_than_those_before_it_is_told_alone(tmp_path: Path) -> None:
    gathered = Pace(Carrier("", str(tmp_path)))
    ahead = time.time_ns() + 10**13
    took_ms = [20] * 40 + [2000, 300, 30] + [20] * 20 + [90] + [20] * 10 + [120]
    numbers = iter(range(1, len(took_ms) + 1))
    for told in (took_ms[:15], took_ms[15:30], took_ms[30:63], took_ms[63:74], took_ms[74:]):
        for took in told:  # which is told of once a second
            end = ahead + took * 10**6
            gathered.add(Paced(next(numbers), ahead, ahead + 10**6, end, 8, (1, 4)))
            ahead = end
        gathered.tell(False)
    gathered.close()

    slow = [s for s in telemetry.spans_of(str(tmp_path)) if s.name == "lepton.slow_step"]
    # 300 ms was of the same second as 2 s; 90 ms is less than five times the usual
    assert [s.attributes["lepton.step"] for s in slow] == [41, 75]
    assert [s.end_ns - s.start_ns for s in slow] == [2 * 10**9, 120 * 10**6]
    assert slow[0].attributes["lepton.input_wait_s"] == 0.001
    assert strays("lepton.slow_step", slow[0].attributes) == []


@given(st.lists(st.floats(0, 100), min_size=1), st.floats(0.01, 1))
def test_a_quantile_is_the_least_value_that_enough_values_do_not_exceed(
    values: list[float], share: float
) -> None:
    found = pace.quantile(sorted(values), share)
    enough = [v for v in values if sum(w <= v for w in values) >= share * len(values)]

    assert found == min(enough)


IDLE = """
import sys
from lepton import telemetry
telemetry.measure("lepton.read.rows", 7)
sys.stdin.read()
"""


def test_a_process_that_has_no_more_to_tell_does_not_wait_for_the_interval(
    collector: Collector,
) -> None:
    environment = collector.environment(OTEL_METRIC_EXPORT_INTERVAL="3600000")
    with subprocess.Popen(
        [sys.executable, "-c", IDLE], env=environment, stdin=subprocess.PIPE
    ) as idle:
        assert collector.wait_for(lambda c: "lepton.read.rows" in c.metrics())
        idle.kill()

    assert _sum(collector.metrics()["lepton.read.rows"]) == 7


def test_spans_that_never_waited_to_be_sent_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "prometheus")
    monkeypatch.setattr(spool, "MOST", 12)
    monkeypatch.setattr(spool, "EVERY_S", 3600)
    board, before = Board(), delivery.dropped()["traces"]
    metrics._state.dropped["traces"] = before
    telemetry.scrape_by(board)
    kept = telemetry.Spool(str(tmp_path))
    half = Common("lepton.request", attributes={"lepton.model": "\ud800"})
    for n in range(16):  # of which the last four are too many
        kept.leave(half if n in (3, 4) else Common("lepton.request"), "", 1, 2)
    kept.close()
    rounds.make()

    assert len(telemetry.spans_of(str(tmp_path))) == 10
    assert delivery.dropped()["traces"] - before == 6
    assert sum(loss.lost for loss in telemetry.losses_of(str(tmp_path), ended=False)) == 6
    assert board.put == [("lepton_telemetry_dropped", 6, {"lepton_signal": "traces"})]
