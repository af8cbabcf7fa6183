"""Training in this process: resuming, refusals, evaluation, registration. No Ray."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support
from torch.nn import functional

import lepton
from lepton import checkpoints
from lepton.errors import CheckpointError, GateError, TrainingError
from lepton.export.restore import Predictor
from lepton.lake import Snapshot
from lepton.stream import mix
from lepton.training.recovery import fatal_rank
from lepton.training.steps import Attempt, Step, effective, replayed


def make_loop(*, fail_at: int | None = None, width: int = 4) -> Callable[[Any], None]:
    def loop(worker: Any) -> None:
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Linear(3, width), torch.nn.Tanh(), torch.nn.Linear(width, 3)
        )
        opt = torch.optim.Adam(net.parameters(), lr=0.02)
        worker.attach(net=net, opt=opt)
        for batch in worker.batches():
            if worker.step_number == fail_at:
                raise RuntimeError("the power went out")
            worker.step(functional.cross_entropy(net(batch["x"]), batch["y"], reduction="sum"))

    return loop


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    x = np.random.default_rng(0).normal(size=(330, 3)).astype("float32")
    rows = pa.table({"x": list(x), "y": x.argmax(1).astype("int64")})
    return lepton.write(rows, tmp_path_factory.mktemp("lake") / "t")


def weights(run: lepton.Run) -> dict[str, torch.Tensor]:
    return checkpoints.restore(run.checkpoint)["net"]


def test_a_resumed_run_ends_with_the_weights_of_an_undisturbed_one(
    table: Snapshot, tmp_path: Path
) -> None:
    stream = table.stream(batch_size=50, epochs=3, lanes=1)
    options: dict[str, Any] = {"home": str(tmp_path), "checkpoint_every": 4, "audit": True}
    whole = lepton.train(make_loop(), stream, name="whole", **options)
    with pytest.raises(RuntimeError, match="power"):
        lepton.train(make_loop(fail_at=10), stream, name="broken", **options)
    mended = lepton.train(make_loop(), stream, name="broken", **options)

    assert [a.step for a, _ in mended.attempts] == [0, 8]
    assert mended.replayed == 2
    assert mended.losses == whole.losses
    history = mended.history()
    assert history["step"].to_pylist() == list(range(1, mended.steps + 1))
    assert history["loss"].to_pylist() == whole.losses
    assert sum(history["rows"].to_pylist()) == 3 * 330
    assert all(torch.equal(a, weights(mended)[k]) for k, a in weights(whole).items())
    assert mended.consumption(stream).exact
    assert mended.consumption(stream).rows == 3 * 330


def test_a_run_on_a_mixture_that_follows_resumes(table: Snapshot, tmp_path: Path) -> None:
    older = lepton.write(table.to_arrow(), tmp_path / "other")

    def run(name: str, *, fail_at: int | None = None) -> lepton.Run:
        live = table.stream(batch_size=24, epochs=2, follow=True)
        rows = mix(live, older.stream(batch_size=8, seed=4))
        loop = make_loop(fail_at=fail_at)
        return lepton.train(loop, rows, name=name, home=str(tmp_path), checkpoint_every=3)

    with pytest.raises(RuntimeError, match="power"):
        run("cut", fail_at=8)
    whole, cut = run("whole"), run("cut")

    assert cut.steps == whole.steps
    for name, value in weights(whole).items():
        assert torch.equal(weights(cut)[name], value)
    with pytest.raises(TrainingError, match="not one table version's"):
        whole.consumption(mix(table.stream(batch_size=24), table.stream(batch_size=8)))


def test_rows_that_a_transform_drops_do_not_weigh(table: Snapshot, tmp_path: Path) -> None:
    """The mean is over the rows that arrive: dropping rows equals filtering them beforehand."""

    def loop(worker: Any) -> None:
        net = torch.nn.Linear(1, 1)
        with torch.no_grad():
            net.weight.fill_(0.5)
            net.bias.fill_(0.0)
        worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
        for batch in worker.batches():
            worker.step(net(batch["x"].float().reshape(-1, 1)).sum())

    rows = lepton.write(pa.table({"x": [1.0, 2.0, 3.0, 100.0]}), tmp_path / "t")
    drop = rows.stream(batch_size=4, lanes=1, transform=lambda t: t.filter(pc.field("x") < 50))
    where = rows.where("x < 50").stream(batch_size=4, lanes=1)
    found = [
        weights(lepton.train(loop, stream, name=name, home=str(tmp_path)))
        for name, stream in (("drop", drop), ("where", where))
    ]

    for name in found[0]:
        assert torch.allclose(found[0][name], found[1][name])


def test_a_finished_run_is_returned_and_more_epochs_go_on(table: Snapshot, tmp_path: Path) -> None:
    def never(_: Any) -> None:
        raise AssertionError("a finished run must not train")

    first = table.stream(batch_size=50, epochs=1, lanes=1)
    run = lepton.train(make_loop(), first, name="r", home=str(tmp_path))
    again = lepton.train(never, first, name="r", home=str(tmp_path))
    assert again.steps == run.steps == 7
    longer = table.stream(batch_size=50, epochs=2, lanes=1)
    with pytest.raises(RuntimeError, match="power"):
        lepton.train(make_loop(fail_at=10), longer, name="r", home=str(tmp_path))
    more = lepton.train(make_loop(), longer, name="r", home=str(tmp_path))

    assert more.steps == 14
    other = table.stream(batch_size=25, lanes=1)
    with pytest.raises(TrainingError, match="another row order"):
        lepton.train(never, other, name="r", home=str(tmp_path))


def no_step(worker: Any) -> None:
    worker.attach(net=torch.nn.Linear(3, 3))
    for _ in worker.batches():
        pass


def no_batches(worker: Any) -> None:
    worker.attach(net=torch.nn.Linear(3, 3))


def vector_loss(worker: Any) -> None:
    net = torch.nn.Linear(3, 3)
    worker.attach(net=net)
    for batch in worker.batches():
        worker.step(net(batch["x"]))


def attach_nothing(worker: Any) -> None:
    next(worker.batches())


def attach_twice(worker: Any) -> None:
    worker.attach(net=torch.nn.Linear(3, 3))
    worker.attach(net=torch.nn.Linear(3, 3))


def attach_a_number(worker: Any) -> None:
    worker.attach(rate=0.1)


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        (no_step, "without worker.step"),
        (no_batches, "the loop made no step"),
        (vector_loss, "a scalar tensor"),
        (attach_nothing, "call worker.attach"),
        (attach_twice, "is called once"),
        (attach_a_number, "cannot attach 'rate'"),
    ],
)
def test_a_loop_that_cannot_work_is_told_why(
    table: Snapshot, tmp_path: Path, loop: Callable[[Any], None], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        lepton.train(loop, table.stream(batch_size=50, lanes=1), name="r", home=str(tmp_path))


def test_a_checkpoint_of_another_model_is_refused(table: Snapshot, tmp_path: Path) -> None:
    short = table.stream(batch_size=50, lanes=1)
    lepton.train(make_loop(width=4), short, name="r", home=str(tmp_path))
    longer = table.stream(batch_size=50, epochs=2, lanes=1)
    with pytest.raises(CheckpointError, match="of another model; use another run name"):
        lepton.train(make_loop(width=5), longer, name="r", home=str(tmp_path))


@pytest.mark.parametrize("workers", [0, (0, 0), (4, 2), (1, 2, 3), -1, True])
def test_numbers_of_workers_that_cannot_be(table: Snapshot, tmp_path: Path, workers: Any) -> None:
    if workers is True:
        return
    with pytest.raises(ValueError, match="workers="):
        lepton.train(
            no_step, table.stream(batch_size=8), name="r", workers=workers, home=str(tmp_path)
        )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("home", ["s3://lake/home/", "abfss://c@a.dfs.core.windows.net/home"])
def test_a_home_that_is_no_folder_is_refused_before_any_work(
    table: Snapshot, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead = re.escape(f'checkpoints="{home.rstrip("/")}/runs"')
    stream = table.stream(batch_size=10)
    with pytest.raises(TrainingError, match=f"takes a file system that all nodes see.*{instead}"):
        lepton.train(make_loop(), stream, name="r", home=home)
    monkeypatch.setenv("LEPTON_HOME", home)
    with pytest.raises(TrainingError, match=instead):
        lepton.train(make_loop(), stream, name="r")


def test_a_batch_smaller_than_the_workers_is_refused(table: Snapshot, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="smaller than lanes"):
        lepton.train(
            no_step, table.stream(batch_size=2), name="r", workers=(1, 4), home=str(tmp_path)
        )


def test_evaluation_counts_exactly_and_is_kept(table: Snapshot, tmp_path: Path) -> None:
    home = str(tmp_path)
    run = lepton.train(make_loop(), table.stream(batch_size=50, lanes=1), name="r", home=home)
    found = lepton.evaluate(run, table, label="y", home=home)
    rows = table.to_arrow()
    answers = Predictor(run.checkpoint)(rows)["output"].argmax(1).numpy()
    labels = rows["y"].to_numpy()
    p, r, f, _ = precision_recall_fscore_support(labels, answers, average="macro", zero_division=0)

    assert found.metrics == pytest.approx(
        {"accuracy": (answers == labels).mean(), "precision": p, "recall": r, "f1": f}
    )
    kept = lepton.table(tmp_path / "evaluations").to_arrow().to_pylist()
    assert [(k["rows"], k["f1"], k["table"]) for k in kept] == [
        (330, found.metrics["f1"], str(table))
    ]


def ray_runs() -> bool:
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def test_registering_and_gating_need_no_ray(table: Snapshot, tmp_path: Path) -> None:
    home, before = str(tmp_path), ray_runs()
    stream = table.stream(batch_size=50, lanes=1)
    one = lepton.train(make_loop(), stream, name="one", home=home)
    two = lepton.train(make_loop(), stream, name="two", home=home)
    model = lepton.register(one, "m", metrics={"accuracy": 0.5}, home=home)

    assert model.lineage["table_version"] == table.version
    assert model.lineage["cursor"]["epoch"] == 1
    with pytest.raises(CheckpointError, match="is of run 'one', not of 'two'"):
        lepton.register(two, "m", checkpoint=one.checkpoint, home=home)
    for gate in ("accuracy >= 0.9", "recall > 0.1", "accuracy >", "accuracy"):
        with pytest.raises(GateError):
            lepton.promote(model, gate=gate, home=home)
    assert ray_runs() == before


def step(number: int, loss: float = 0.0) -> list[Step]:
    return [
        Step(step=number, epoch=0, batch=number - 1, rows=1, loss=loss, high=0, low=0, time_ns=0)
    ]


def attempt(number: int, began: int) -> Attempt:
    return Attempt(
        number=number, session="s", step=began, world_size=1, pids=(1,), hosts=("h",), time_ns=0
    )


def test_a_step_counts_in_the_attempt_that_made_it_last() -> None:
    lives = [
        (attempt(0, 0), {n: step(n, 0.0) for n in range(1, 8)}),
        (attempt(1, 4), {n: step(n, 1.0) for n in (5, 6)}),
        (attempt(2, 4), {n: step(n, 2.0) for n in (5,)}),
    ]

    assert {n: s[0].loss for n, s in effective(lives).items()} == {1: 0, 2: 0, 3: 0, 4: 0, 5: 2}
    assert replayed(lives) == 3 + 2


def test_only_the_persons_own_errors_end_a_run() -> None:
    assert fatal_rank({1: ["RayActorError"], 0: ["PeerLost", "RuntimeError"]}) is None
    assert fatal_rank({0: ["PeerLost", "RuntimeError"]}) is None
    assert fatal_rank({0: ["PeerLost"], 1: ["ZeroDivisionError"]}) == 1
    assert fatal_rank({1: ["RayActorError"], 0: ["ZeroDivisionError"]}) is None
