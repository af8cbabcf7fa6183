"""Figures of requests, reads, trials and GPUs: what is measured, and by which labels."""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import lepton
from lepton.serving.figures import Figures
from lepton.telemetry import Common, Several, Spool, metrics, spans_of
from tests.unit.collector import Collector


class Kept:
    """Keeps what is measured."""

    def __init__(self) -> None:
        self.told: list[tuple[str, float, dict[str, Any]]] = []
        self.traces: set[str] = set()

    def take(self, what: Any, value: float, labels: Any, trace: str) -> None:
        self.told.append((what.name, value, dict(labels)))

    def take_all(self, what: Any, values: Any, labels: Any, trace_of: Any) -> None:
        self.traces |= {trace_of(n) for n in range(len(values))} if trace_of else set()
        self.told += [(what.name, value, dict(labels)) for value in values]

    def of(self, name: str) -> list[tuple[float, dict[str, Any]]]:
        return [(value, labels) for told, value, labels in self.told if told == name]


@pytest.fixture
def kept() -> Iterator[Kept]:
    found = Kept()
    metrics._state.__init__()
    metrics._state.sinks = [found]
    yield found
    metrics._state.__init__()


def _answered(version: int, *, variant: str = "champion", error: str = "", kind: str = "server"):
    about = {
        "http.request.method": "POST",
        "http.response.status_code": 500 if error else 200,
        "lepton.model": "m",
        "lepton.version": version,
        "lepton.variant": variant,
        "lepton.rows": version,
    }
    return Common("lepton.request", kind, error, (), about)


def _spans(common: Common, count: int) -> Several:
    own = [f"00-{'ab' * 16}-{n:016x}-01" for n in range(count)]
    return Several(common, own, [""] * count, [0] * count, [10**9] * count)


def test_requests_are_measured_by_answer_version_and_variant(kept: Kept) -> None:
    figures = Figures(shares_s=0)
    first, canary = _answered(1), _answered(2, variant="canary")
    failed, shadow = _answered(1, error="OSError"), _answered(2, kind="internal")
    for common, count in ((first, 6), (canary, 1), (failed, 1), (shadow, 1)):
        figures.take(_spans(common, count), True)
        figures.settle()
    figures.close()

    took = kept.of("http.server.request.duration")
    assert {value for value, _ in took} == {1.0}
    counts = Counter((k["lepton.version"], k.get("error.type")) for _, k in took)
    assert counts == {(1, None): 6, (2, None): 1, (1, "OSError"): 1}
    assert Counter(v for v, _ in kept.of("lepton.serving.request.rows")) == {1: 7, 2: 1}
    shares = [(k["lepton.version"], v) for v, k in kept.of("lepton.serving.share")]
    assert shares == [(1, 1.0), (1, 0.0), (2, 1.0), (1, 1.0), (2, 0.0)]
    assert kept.traces == {f"00-{'ab' * 16}-{n:016x}-01" for n in range(6)}


LAST = """
import sys
from lepton import telemetry
from lepton.serving.figures import Figures
from lepton.telemetry import Common, Spool, spool
spool.EVERY_S = 3600
about = {"lepton.model": "m", "lepton.version": 1, "lepton.variant": "champion", "lepton.rows": 2}
figures = Figures()
spans = Spool(sys.argv[1], figures.take)
about["http.response.status_code"] = 200
common = Common("lepton.request", "server", attributes=about)
for n in range(300):
    spans.leave(common, "", 10**18, 10**18 + n)
"""


def test_what_was_asked_last_before_a_process_ends_is_measured(tmp_path: Path) -> None:
    collector = Collector()
    command = [sys.executable, "-c", LAST, str(tmp_path)]
    subprocess.run(command, env=collector.environment(), check=True, timeout=180)
    found = collector.metrics()
    collector.close()

    for name in ("http.server.request.duration", "lepton.serving.request.rows"):
        assert found[name].histogram.data_points[0].count == 300
    assert len(collector.spans()) == len(spans_of(str(tmp_path))) == 300


def test_unsampled_requests_are_measured_too(kept: Kept, tmp_path: Path) -> None:
    told: list[tuple[str, int, bool]] = []
    spool = Spool(str(tmp_path), lambda s, sampled: told.append((s.common.name, len(s), sampled)))
    common = Common("lepton.request")
    for flag in ("00", "01", "03"):
        parent = f"00-{'ab' * 16}-{'cd' * 8}-{flag}"
        assert spool.leave(common, parent, 1, 2)[-2:] == f"0{int(flag) & 1}"
    spool.leave(common, f"00-{'ab' * 16}-{'cd' * 8}-00", 1, 2, certain=True)
    spool.close()

    assert sorted(told) == [("lepton.request", 1, False), ("lepton.request", 3, True)]
    assert len(spans_of(str(tmp_path))) == 3


def test_reads_are_measured_in_rows_and_bytes(kept: Kept, tmp_path: Path) -> None:
    rows = pa.table({"x": np.arange(100, dtype="float32"), "y": np.arange(100, dtype="int64")})
    stream = lepton.write(rows, tmp_path / "t").stream(batch_size=10)
    shard = stream.shard(0, 1)
    assert sum(len(b["x"]) for b in shard.iter_torch_batches(batch_size=10)) == 100

    assert sum(value for value, _ in kept.of("lepton.read.rows")) == 100
    assert sum(value for value, _ in kept.of("lepton.read.size")) == 100 * (4 + 8)
