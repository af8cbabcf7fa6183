"""A run as a picture and as TensorBoard's files."""

import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional

import lepton
from lepton import Validation
from lepton.errors import TrainingError
from lepton.lake import Snapshot
from lepton.training.plot import rate_of
from lepton.training.run import Run


def make_loop(fail_at: int | None = None) -> Callable[[Any], None]:
    def loop(worker: Any) -> None:
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 3)
        worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.001))
        for batch in worker.batches():
            if worker.step_number == fail_at:
                raise RuntimeError("the power went out")
            worker.step(functional.cross_entropy(net(batch["x"]), batch["y"], reduction="sum"))

    return loop


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    x = np.random.default_rng(0).normal(size=(300, 3)).astype("float32")
    rows = pa.table({"x": list(x), "y": x.argmax(1).astype("int64")})
    return lepton.write(rows, tmp_path_factory.mktemp("lake") / "t")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read event files as TensorBoard does: length, its checksum, a protobuf, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 12 + size + 4
            if event.session_log.status == 1:  # START: purge what lies beyond
                for values in found.values():
                    values[:] = [v for v in values if v[0] < event.step]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


@pytest.fixture(scope="module")
def run(table: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Fails once, and goes on."""
    options: dict[str, Any] = {
        "name": "r",
        "home": str(tmp_path_factory.mktemp("home")),
        "checkpoint_every": 4,
        "validate": Validation(table, label="y", every=5),
        "tensorboard": True,
    }
    stream = table.stream(batch_size=30, lanes=1)
    with pytest.raises(RuntimeError, match="power"):
        lepton.train(make_loop(7), stream, **options)
    return lepton.train(make_loop(), stream, **options)


def test_tensorboard_shows_what_the_run_says_of_itself(run: Run) -> None:
    found = scalars(Path(run.folder) / "tensorboard")

    assert found["train/loss"] == [
        (step, pytest.approx(loss)) for step, loss in enumerate(run.losses, 1)
    ]
    assert found["train/workers"] == [(step, 1.0) for step in range(1, 11)]
    assert all(rate > 0 for _, rate in found["train/rows_per_second"])
    judged = run.evaluations()
    assert found["validate/accuracy"] == [
        (step, pytest.approx(value))
        for step, value in zip(
            judged["step"].to_pylist(), judged["accuracy"].to_pylist(), strict=True
        )
    ]


def test_a_folder_of_ones_own(table: Snapshot, tmp_path: Path) -> None:
    options: dict[str, Any] = {"name": "r", "home": str(tmp_path / "home")}
    stream = table.stream(batch_size=100, lanes=1)
    run = lepton.train(make_loop(), stream, tensorboard=tmp_path / "logs" / "r", **options)

    assert len(scalars(tmp_path / "logs" / "r")["train/loss"]) == run.steps
    assert not (Path(run.folder) / "tensorboard").exists()


def test_the_picture_has_what_happened(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra [plot] is not installed")
    figure = run.plot(tmp_path / "run.svg")
    loss, judged, rate, workers = figure.axes

    assert loss.lines[0].get_ydata().tolist() == run.losses
    assert [line.get_label() for line in judged.lines[:4]] == [
        "accuracy",
        "precision",
        "recall",
        "f1",
    ]
    assert len(rate.lines[0].get_ydata()) == 9
    assert [t.get_text()[:5] for t in workers.texts] == ["1 → 1"]
    assert workers.texts[0].get_text().endswith("3 again")
    assert "<svg" in (tmp_path / "run.svg").read_text()


def test_rows_a_second_are_counted_over_stretches() -> None:
    steps, rate = rate_of(np.arange(1, 1001), np.full(1000, 8), np.arange(1000) / 4)

    assert len(steps) == 199
    assert steps[-1] == 1000
    assert np.allclose(rate, 32)
    assert len(rate_of(np.array([1]), np.array([8]), np.array([0.0]))[0]) == 0


def test_without_matplotlib_it_says_what_to_install(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(TrainingError, match=r"pip install 'lepton\[plot\]'"):
        run.plot()


def test_a_run_without_a_step_cannot_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra [plot] is not installed")
    with pytest.raises(TrainingError, match="no step yet"):
        Run(name="r", folder=str(tmp_path)).plot()
