"""A trace's page with ten thousand spans and long names, in a real browser without a network."""

import shutil
from pathlib import Path

import pytest

from lepton.report import Span
from lepton.report.tracepage import TracePage, render_trace
from tests.cluster.chromium import open_page

SECOND = 1_000_000_000
WORKERS = 8


def _spans() -> list[Span]:
    spans: list[Span] = []

    def add(name: str, start: float, end: float, process: str, **more: object) -> None:
        failed = bool(more.pop("failed", False))
        spans.append(
            Span(
                name=name,
                span_id=f"{len(spans) + 1:016x}",
                parent_id=None if not spans else f"{1:016x}",
                trace_id="ab" * 16,
                start_ns=int(start * SECOND),
                end_ns=int(end * SECOND),
                process=process,
                status="error" if failed else "ok",
                attributes={f"lepton.{key}": value for key, value in more.items()},
            )
        )

    add("lepton.train", 0, 100, "a driver's script with a name as long as names can be.py (1)")
    for rank in range(WORKERS):
        worker = f"RayTrainWorker.execute_with_a_long_name ({1000 + rank})"
        for window in range(6 if rank == 3 else 20):
            add("lepton.steps", window * 5, window * 5 + 5, worker, rank=rank)
        for n in range(10_000 // WORKERS):
            add("lepton.read", n / 13, n / 13 + 0.01, worker, lane=rank)
    first = "RayTrainWorker.execute_with_a_long_name (1000)"
    add("lepton.train.failure", 30, 32, first, failed=True, step=6, world_size=WORKERS - 1)
    add("lepton.train.resize", 50, 51, first, step=10, world_size=WORKERS)
    return spans


def test_ten_thousand_spans_open(tmp_path: Path) -> None:
    if shutil.which("chromium") is None:
        pytest.skip("no chromium: `make test` installs it (apt-get install chromium)")
    spans = _spans()
    curve = [(n * SECOND, 2.0 / (n + 1)) for n in range(100)]
    path = tmp_path / "page.html"
    page = TracePage(
        title="run with-a-long-name", trace_id="ab" * 16, spans=spans, curves={"loss": curve}
    )
    path.write_text(render_trace(page))
    seen = open_page(path, tmp_path / "chromium")

    assert seen.console == ""
    assert f"{len(spans)} spans" in seen.dom
    assert seen.dom.count('class="lane"') == WORKERS + 1
    assert seen.dom.count('class="killed"') == 1
    assert all(f"({1000 + rank}), rank {rank}<" in seen.dom for rank in range(WORKERS))
    assert len(seen.screenshot) > 20_000
