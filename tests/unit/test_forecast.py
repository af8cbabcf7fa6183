"""What a run will take, and how far off that was."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

import lepton
from lepton.cli import main
from lepton.errors import TrainingError
from lepton.training import outcome_of
from lepton.training.forecast import Measured, fit, forecast, seconds_of
from lepton.training.planner import measured_in
from lepton.training.run import Run, load_run
from lepton.training.steps import Attempt, Step, StepLog, write_attempt


@given(
    st.floats(1e-6, 1e-2),
    st.floats(0, 1e-2),
    st.lists(st.integers(1, 16), min_size=2, max_size=6, unique=True),
)
def test_a_pace_that_is_measured_is_found(compute: float, fixed: float, sizes: list[int]) -> None:
    measured = [Measured(workers=n, rows=1000, seconds=1000 * (compute / n + fixed)) for n in sizes]
    pace = fit(measured, 2.0)

    assert pace.sizes == tuple(sorted(sizes))
    assert pace.efficiency(1) == pytest.approx(1)
    for m in measured:
        assert pace.seconds(1000, m.workers) == pytest.approx(2.0 + m.seconds, rel=1e-6)


def test_one_size_alone_scales_perfectly_and_luck_does_not_count() -> None:
    one = fit([Measured(workers=4, rows=800, seconds=2.0)], 1.0)
    assert one.seconds(800, 8) == pytest.approx(2.0)
    assert one.rows_per_second == pytest.approx(100)
    lucky = [Measured(workers=1, rows=100, seconds=1), Measured(workers=2, rows=300, seconds=1)]
    assert fit(lucky, 0).fixed == 0
    slower = [Measured(workers=1, rows=100, seconds=1), Measured(workers=2, rows=50, seconds=1)]
    assert fit(slower, 0).compute == 0
    with pytest.raises(ValueError, match="measured"):
        fit([], 0)


def test_the_cheapest_within_the_deadline_is_chosen() -> None:
    sizes = {1: 100.0, 4: 40.0}
    pace = fit([Measured(workers=n, rows=1000, seconds=s) for n, s in sizes.items()], 10.0)
    found = forecast(pace, 1000, (1, 8), deadline=60, price=3.6)

    assert [c.seconds for c in found.choices][:4:3] == pytest.approx([110, 50])
    assert found.best is not None
    assert found.best.workers == 3  # 56.7 s; 2 take 70
    assert found.best.cost == pytest.approx(3 * found.best.seconds * 3.6 / 3600)
    assert [c.extrapolated for c in found.choices] == [False] * 4 + [True] * 4
    assert forecast(pace, 1000, (1, 8), deadline=20).best is None
    cheapest = forecast(pace, 1000, (1, 8)).best
    assert cheapest is not None
    assert cheapest.workers == 1
    assert cheapest.cost is None
    for rows, workers, more in ((0, (1, 2), {}), (1, (2, 1), {}), (1, (1, 2), {"price": -1.0})):
        with pytest.raises(ValueError, match="must"):
            forecast(pace, rows, workers, **more)


def test_time_spans() -> None:
    assert [seconds_of(t) for t in ("2h", "1h30m", "45s", "1.5m", "90", 7)] == [
        7200,
        5400,
        45,
        90,
        90,
        7,
    ]
    with pytest.raises(ValueError, match="no time span"):
        seconds_of("soon")


def run_with(folder: Path, lives: list[tuple[int, int]], called: float) -> Run:
    """A run as it would be: (workers, steps) of 0.1 s / workers + 0.02 s, 4 s to begin with."""
    folder.mkdir(parents=True)
    name = folder.name
    body = {
        "name": name,
        "trace_id": "",
        "traceparent": "",
        "time": called,
        "steps": 9,
        "table": "t",
    }
    (folder / "run.json").write_text(json.dumps(body))
    now, step = called + 4.0, 0
    for number, (workers, steps) in enumerate(lives):
        ranks = [StepLog(folder / "steps", number, r) for r in range(workers)]
        attempt = Attempt(
            number=number,
            session="s",
            step=step,
            world_size=workers,
            pids=(1,) * workers,
            hosts=("h",) * workers,
            time_ns=int(now * 1e9),
        )
        write_attempt(folder / "steps", attempt)
        for _ in range(steps):
            step += 1
            now += 0.1 / workers + 0.02
            for log in ranks:
                part = Step(step=step, epoch=0, batch=step, rows=12 // workers, high=0, low=0)
                log.contribute(part)
                log.made(step, 1.0, int(now * 1e9))
        for log in ranks:
            log.close()
        now += 1.0  # a change of the workers
    return load_run(name, str(folder.parent.parent))


def test_an_elastic_run_tells_how_it_scales(tmp_path: Path, capsys: Any) -> None:
    run = run_with(tmp_path / "runs" / "past", [(1, 50), (2, 40), (4, 30)], 1e9)
    assert [(m.workers, m.rows) for m in measured_in(run)] == [(1, 588), (2, 468), (4, 348)]
    found = lepton.plan(run, workers=(1, 4), rows=1200, price=1.0, home=str(tmp_path))
    for choice in found.choices:
        expected = 4.12 + 100 * (0.1 / choice.workers + 0.02)
        assert choice.seconds == pytest.approx(expected, rel=1e-3)

    home = ["--home", str(tmp_path)]
    asked = ["plan", "past", "--workers", "1-4", "--rows", "1200", "--deadline", "9s", *home]
    assert main([*asked, "--price", "3.5", "--for", "next"]) == 0
    shown = capsys.readouterr().out
    assert "4 ←" in shown or "3 ←" in shown
    assert main([*asked[:-4], "--deadline", "5s", *home]) == 1
    assert "none meets the deadline" in capsys.readouterr().out
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["best"] in (3, 4)

    folder = tmp_path / "runs" / "next"
    kept = (folder / "forecast.json").read_text()
    (folder / "forecast.json").unlink()
    folder.rmdir()
    after = run_with(folder, [(2, 50)], 2e9)
    assert main(["plan", "next", *home]) == 1  # nobody predicted anything
    (folder / "forecast.json").write_text(kept)
    outcome = outcome_of(after)
    assert outcome is not None
    assert outcome.actual == pytest.approx(4 + 50 * 0.07)
    assert abs(outcome.off) < 0.03
    capsys.readouterr()
    assert main(["plan", "next", *home]) == 0
    assert "were predicted" in capsys.readouterr().out
    assert main(["runs", *home]) == 0
    assert f"{outcome.predicted:.1f} s {outcome.off:+.1%}" in capsys.readouterr().out
    assert main(["runs", "--json", *home]) == 0
    rows = {row["run"]: row["forecast"] for row in json.loads(capsys.readouterr().out)}
    assert rows == {"past": None, "next": outcome.to_dict()}


def loop(worker: Any) -> None:
    net = torch.nn.Linear(3, 3)
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
    for batch in worker.batches():
        worker.step(functional.cross_entropy(net(batch["x"]), batch["y"], reduction="sum"))


def test_a_run_says_how_far_off_its_forecast_was(tmp_path: Path, capsys: Any) -> None:
    x = np.random.default_rng(0).normal(size=(300, 3)).astype("float32")
    rows = pa.table({"x": list(x), "y": x.argmax(1).astype("int64")})
    table = lepton.write(rows, tmp_path / "t")
    stream = table.stream(batch_size=10, lanes=1)
    home = str(tmp_path)
    lepton.train(loop, stream, name="past", home=home)
    asked = ["plan", "past", "--workers", "1", "--table", str(tmp_path / "t"), "--epochs", "1"]
    assert main([*asked, "--for", "next", "--json", "--home", home]) == 0
    (choice,) = json.loads(capsys.readouterr().out)["choices"]
    assert choice["seconds"] > 0
    run = lepton.train(loop, stream, name="next", home=home)

    outcome = outcome_of(run)
    assert outcome is not None
    assert math.isfinite(outcome.off)
    assert outcome.predicted == pytest.approx(choice["seconds"], rel=1e-6)  # it had those rows
    assert f"run next {outcome}\n" in capsys.readouterr().err
    with pytest.raises(TrainingError, match="no run 'other'"):
        lepton.plan("other", workers=1, rows=300, home=home)
    single = lepton.train(loop, table.stream(batch_size=300, lanes=1), name="single", home=home)
    with pytest.raises(TrainingError, match="'single' cannot be measured"):
        lepton.plan(single, workers=1, rows=300, home=home)
