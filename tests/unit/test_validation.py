"""Evaluation and early stopping in the run, in this process. No Ray."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import log_loss
from torch.nn import functional

import lepton
from lepton import EarlyStopping, Validation
from lepton.errors import LakeError, TrainingError
from lepton.export.restore import Predictor
from lepton.lake import Snapshot
from lepton.preprocess import Preparation
from lepton.stream import mix
from lepton.telemetry import spans_of
from lepton.training import evaluations
from lepton.training.run import load_run


def entropy(labels: Any, scores: Any) -> float:
    chances = np.exp(scores - scores.max(1, keepdims=True))
    return log_loss(labels, chances / chances.sum(1, keepdims=True), labels=[0, 1, 2])


def make_loop(
    *, fail_at: int | None = None, rate: float = 0.02, dropout: float = 0.5
) -> Callable[[Any], None]:
    def loop(worker: Any) -> None:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        net.insert(1, torch.nn.Dropout(dropout))
        opt = torch.optim.Adam(net.parameters(), lr=rate)
        worker.attach(net=net, opt=opt)
        for batch in worker.batches():
            assert net.training
            if worker.step_number == fail_at:
                raise RuntimeError("the power went out")
            worker.step(functional.cross_entropy(net(batch["x"]), batch["y"], reduction="sum"))

    return loop


def rows_of(seed: int, rows: int, path: Path) -> Snapshot:
    x = np.random.default_rng(seed).normal(size=(rows, 3)).astype("float32")
    return lepton.write(pa.table({"x": list(x), "y": x.argmax(1).astype("int64")}), path)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return rows_of(0, 300, tmp_path_factory.mktemp("lake") / "t")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return rows_of(1, 170, tmp_path_factory.mktemp("lake") / "v")


def test_the_run_judges_as_lepton_evaluate_does(
    table: Snapshot, held_out: Snapshot, tmp_path: Path
) -> None:
    home = str(tmp_path)
    stream = table.stream(batch_size=50, epochs=2, lanes=2)
    judge = Validation(held_out, label="y", every=5, metrics={"loss_there": entropy}, batch_size=40)
    run = lepton.train(make_loop(), stream, name="r", home=home, validate=judge, checkpoint_every=4)
    found = run.evaluations().to_pylist()
    after = lepton.evaluate(run, held_out, label="y", home=home)
    scores = Predictor(run.checkpoint)(held_out.to_arrow())["output"].numpy()

    assert [e["step"] for e in found] == [5, 10, 12]  # the last step, too
    assert {e["rows"] for e in found} == {170}
    assert {e["table"] for e in found} == {str(held_out)}
    assert found[-1]["confusion"] == after.confusion.tolist()
    assert {k: found[-1][k] for k in after.metrics} == after.metrics
    labels = held_out.to_arrow()["y"].to_numpy()
    assert found[-1]["loss_there"] == pytest.approx(entropy(labels, scores), rel=1e-5)
    assert run.checkpoint.metrics["accuracy"] == after.metrics["accuracy"]
    assert ["accuracy" in c.metrics for c in run.checkpoints] == [False, False, True]
    spans = [s for s in spans_of(f"{home}/traces") if s.name == "lepton.evaluate"]
    assert [s.attributes["lepton.step"] for s in spans if "lepton.step" in s.attributes] == [
        5,
        10,
        12,
    ]


def test_judging_changes_nothing_of_what_is_learnt(
    table: Snapshot, held_out: Snapshot, tmp_path: Path
) -> None:
    stream = table.stream(batch_size=50, epochs=2, lanes=1)
    runs = [
        lepton.train(make_loop(), stream, name=name, home=str(tmp_path), validate=judge)
        for name, judge in (("with", Validation(held_out, label="y", every=1)), ("without", None))
    ]

    assert runs[0].losses == runs[1].losses
    assert len(runs[0].evaluations()) == runs[0].steps


def test_a_resumed_run_judges_what_it_makes_again(
    table: Snapshot, held_out: Snapshot, tmp_path: Path
) -> None:
    stream = table.stream(batch_size=50, epochs=3, lanes=1)
    options: dict[str, Any] = {
        "home": str(tmp_path),
        "checkpoint_every": 4,
        "validate": Validation(held_out, label="y", every=2),
    }
    whole = lepton.train(make_loop(dropout=0.0), stream, name="whole", **options)
    with pytest.raises(RuntimeError, match="power"):
        lepton.train(make_loop(fail_at=7, dropout=0.0), stream, name="cut", **options)
    with (Path(load_run("cut", str(tmp_path)).folder) / evaluations.NAME).open("a") as file:
        file.write('{"step": 8, "torn')  # killed while it wrote
    cut = lepton.train(make_loop(dropout=0.0), stream, name="cut", **options)

    same = ["step", "rows", "accuracy", "f1", "confusion"]
    assert cut.evaluations().select(same) == whole.evaluations().select(same)


def test_a_run_that_has_learnt_enough_stops_and_is_finished(
    table: Snapshot, held_out: Snapshot, tmp_path: Path
) -> None:
    stream = table.stream(batch_size=50, epochs=50, lanes=1)
    options: dict[str, Any] = {"name": "r", "home": str(tmp_path), "keep": 1}
    judge = Validation(held_out, label="y", every=3)
    stop = EarlyStopping("accuracy", patience=2)
    run = lepton.train(make_loop(rate=0.1), stream, validate=judge, stop=stop, **options)
    figures = run.evaluations()["accuracy"].to_pylist()
    done = json.loads((Path(run.folder) / "done.json").read_text())

    assert run.steps < stream.steps
    assert run.steps == 3 * len(figures)
    assert done["stopped"]["metric"] == "accuracy"
    assert done["stopped"]["waited"] == 2
    assert run.best.step == done["stopped"]["best_step"] == run.steps - 6
    assert run.best.metrics["accuracy"] == figures[-3]
    assert [c.step for c in run.checkpoints][-1] == run.steps
    again = lepton.train(never, stream, validate=judge, stop=stop, **options)
    assert again.steps == run.steps
    shorter = table.stream(batch_size=50, epochs=10, lanes=1)
    on = lepton.train(make_loop(rate=0.1), shorter, **options)  # without the rule it goes on
    assert on.steps == shorter.steps


def never(_: Any) -> None:
    raise AssertionError("a finished run must not train")


def test_a_regression_through_a_preparation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(5.0, 3.0, size=200).astype("float32")
    rows = lepton.write(pa.table({"x": x, "y": 2 * x + rng.normal(size=200)}), tmp_path / "t")
    prepare = Preparation.fit(rows, standard=["x"])

    def loop(worker: Any) -> None:
        torch.manual_seed(0)
        net = torch.nn.Linear(1, 1)
        worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.2))
        for batch in worker.batches():
            apart = net(batch["x"][:, None]).squeeze(1) - batch["y"].float()
            worker.step((apart**2).sum())

    judge = Validation(
        rows, label="y", every=4, predict=lambda nets, batch: nets["net"](batch["x"][:, None])
    )
    stream = rows.stream(batch_size=40, epochs=4, lanes=2, transform=prepare)
    run = lepton.train(loop, stream, name="r", home=str(tmp_path), validate=judge)
    last = run.evaluations().to_pylist()[-1]

    assert last["step"] == 20
    assert 0.9 < last["r2"] < 1
    assert last["confusion"] is None
    assert last["mse"] == pytest.approx(np.mean(run.losses[-5:]), rel=0.5)


def test_a_mixture_is_judged_and_a_net_may_give_more_than_scores(
    table: Snapshot, held_out: Snapshot, tmp_path: Path
) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            hidden = self.layer(x)
            return {"scores": hidden.to(torch.bfloat16), "hidden": hidden}

    def loop(worker: Any) -> None:
        torch.manual_seed(0)
        net = Net()
        worker.attach(net=net, opt=torch.optim.Adam(net.parameters(), lr=0.05))
        for batch in worker.batches():
            scores = net(batch["x"])["hidden"]
            worker.step(functional.cross_entropy(scores, batch["y"], reduction="sum"))

    rows = mix(table.stream(batch_size=40, epochs=2), held_out.stream(batch_size=20))
    judge = Validation(held_out, label="y", every=4)
    run = lepton.train(loop, rows, name="r", home=str(tmp_path), validate=judge)

    assert run.evaluations()["rows"].to_pylist()[0] == 170
    assert run.evaluations()["accuracy"].to_pylist()[-1] > 0.5
    assert [o["name"] for o in run.checkpoint.signature["outputs"]] == ["scores", "hidden"]
    after = lepton.evaluate(run, held_out, label="y", home=str(tmp_path))
    assert after.metrics["accuracy"] == run.evaluations()["accuracy"].to_pylist()[-1]


def odd_loop(worker: Any) -> None:
    net = torch.nn.Linear(3, 3)
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
    for batch in worker.batches():
        scores = net(batch["x"] * 2)
        worker.step(functional.cross_entropy(scores, batch["y"], reduction="sum"))


def test_what_cannot_be_judged_is_refused(
    table: Snapshot, held_out: Snapshot, tmp_path: Path
) -> None:
    stream = table.stream(batch_size=50, lanes=1)

    def train(**options: Any) -> None:
        lepton.train(odd_loop, stream, name="r", home=str(tmp_path), **options)

    judge = Validation(held_out, label="y", every=2)
    for kind, message, options in (
        (TrainingError, "no label 'z' after", {"validate": Validation(held_out, label="z")}),
        (LakeError, "no rows", {"validate": Validation(held_out.where("y > 9"), label="y")}),
        (ValueError, "give that, too", {"stop": EarlyStopping("accuracy")}),
        (ValueError, "has the figures", {"validate": judge, "stop": EarlyStopping("mse")}),
    ):
        with pytest.raises(kind, match=message):
            train(**options)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(TrainingError, match="how the validation rows go through the net"):
        train(validate=judge)


@pytest.mark.parametrize(
    "options",
    [{"every": 0}, {"batch_size": 1.5}, {"task": "ranking"}, {"metrics": {"mse": entropy}}],
)
def test_options_that_cannot_be(held_out: Snapshot, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Validation(held_out, label="y", **options)
