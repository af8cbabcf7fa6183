"""Checkpoints keep rows and the net's answers to them; whoever answers otherwise is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

import lepton
from lepton import checkpoints
from lepton.errors import CheckpointError
from lepton.export import recorded
from lepton.export.program import Signature, TensorSpec
from lepton.export.recorded import MOST_BYTES, Twin, compare, example_of, recorded_in
from lepton.export.restore import Predictor


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = torch.nn.Sequential(
            torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5)
        )
        self.last = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.last(self.steps(x))
        return scores, scores.argmax(1)


def loop(worker: Any) -> None:
    net = Net()
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
    for batch in worker.batches():
        scores, _ = net(batch["x"])
        worker.step(torch.nn.functional.cross_entropy(scores, batch["y"], reduction="sum"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> lepton.Run:
    home = tmp_path_factory.mktemp("home")
    x = np.random.default_rng(0).normal(size=(120, 3)).astype("float32")
    table = lepton.write(pa.table({"x": list(x), "y": (x.sum(1) > 0).astype("int64")}), home / "t")
    stream = table.stream(batch_size=40)
    return lepton.train(loop, stream, name="r", home=str(home), checkpoint_every=1)


def changed(manifest: checkpoints.Manifest, home: Path, **answers: torch.Tensor) -> Any:
    """The same checkpoint with other recorded answers."""
    kept = load_file(manifest.path(checkpoints.ANSWERS)) | {
        f"output/{name}": value for name, value in answers.items()
    }
    return checkpoints.write(
        home,
        checkpoints.flatten(checkpoints.restore(manifest)),
        step=manifest.step,
        cursor=manifest.cursor,
        program=manifest.path(checkpoints.PROGRAM),
        answers=kept,
        signature=manifest.signature,
    )


def test_every_checkpoint_has_the_answers_of_its_own_weights(run: lepton.Run) -> None:
    found = [recorded_in(m) for m in run.checkpoints]
    assert len(found) == 3
    rows, answers = zip(*[f for f in found if f], strict=True)
    assert all(torch.equal(r["x"], rows[0]["x"]) for r in rows)
    assert 1 <= len(rows[0]["x"]) <= 32
    assert not torch.equal(answers[0]["output_0"], answers[2]["output_0"])
    for manifest in run.checkpoints:
        compare(Predictor(manifest).program, manifest)


def test_a_program_that_answers_otherwise_is_refused(run: lepton.Run, tmp_path: Path) -> None:
    manifest = run.checkpoint
    program = Predictor(manifest).program
    kept = recorded_in(manifest)
    assert kept is not None
    scores, classes = kept[1]["output_0"], kept[1]["output_1"]
    scale = float(scores.abs().max())

    compare(program, changed(manifest, tmp_path / "a", output_0=scores + 0.5e-3 * scale))
    for case, wrong, words in (
        ("b", {"output_0": scores + 3e-3 * scale}, r"'output_0' is off by .* allowed is"),
        ("c", {"output_0": scores * torch.nan}, "is off by inf"),
        ("d", {"output_1": 1 - classes}, "'output_1' differs from what was recorded"),
        ("e", {"output_0": scores[:, :1].contiguous()}, r"recorded was torch.float32 \(32, 1\)"),
        ("f", {"output_0": scores.double()}, "recorded was torch.float64"),
        ("g", {"other": scores}, "'other' is missing"),
    ):
        with pytest.raises(CheckpointError, match=words):
            compare(program, changed(manifest, tmp_path / case, **wrong))
    other = changed(manifest, tmp_path / "h")
    weights = checkpoints.restore(other)["net"]
    program.load_weights({n: -v if n == "last.weight" else v for n, v in weights.items()})
    with pytest.raises(CheckpointError, match="answers otherwise than it did in training"):
        compare(program, other)


def test_a_checkpoint_without_recorded_answers_is_not_compared(run: lepton.Run) -> None:
    files = {n: f for n, f in run.checkpoint.files.items() if n != checkpoints.ANSWERS}
    compare(Predictor(run.checkpoint).program, replace(run.checkpoint, files=files))


def test_what_is_kept_is_small() -> None:
    assert [len(a) for a in example_of([torch.zeros(100, 4), torch.zeros(100)])] == [32, 32]
    (few,) = example_of([torch.zeros(100, 2**15)])
    assert len(few) == 4
    (one,) = example_of([torch.zeros(2, 2**20)])
    assert len(one) == 1
    spec = TensorSpec(name="x", dtype="float32", shape=(2**20,))
    signature = Signature(inputs=(spec,), outputs=(spec,), net="net")
    assert Twin(torch.nn.Identity(), signature, [one]).answers({"net": {}}) is None
    assert one.numel() * 4 > MOST_BYTES


class Slow(torch.nn.Module):
    """Counts its calls; the clock of the test goes on by so many seconds with each."""

    def __init__(self, seconds: float, clock: list[float]) -> None:
        super().__init__()
        self.seconds, self.clock, self.calls = seconds, clock, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.clock[0] += self.seconds
        return x


@pytest.mark.parametrize(("seconds", "kept"), [(0.001, 32), (0.5, 4), (1.5, 1), (2.5, 0)])
def test_a_slow_net_records_few_answers_or_none(
    monkeypatch: pytest.MonkeyPatch, seconds: float, kept: int
) -> None:
    clock = [0.0]
    monkeypatch.setattr(recorded, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    spec = TensorSpec(name="x", dtype="float32", shape=(3,))
    signature = Signature(inputs=(spec,), outputs=(spec,), net="net")
    net = Slow(seconds, clock)
    twin = Twin(net, signature, [torch.zeros(32, 3)])
    found = [twin.answers({"net": {}}) for _ in range(3)]

    assert [len(f["output/output"]) if f else 0 for f in found] == [kept] * 3
    assert net.calls == (5 if kept else 1)


def test_a_compiled_net_is_asked_as_it_is(run: lepton.Run) -> None:
    spec = TensorSpec(name="x", dtype="float32", shape=(3,))
    signature = Signature(inputs=(spec,), outputs=(spec,), net="net")
    net: Any = torch.compile(torch.nn.Linear(3, 3), backend=refuse)
    rows = torch.ones(2, 3)
    for state in (net.state_dict(), net._orig_mod.state_dict()):
        found = Twin(net, signature, [rows]).answers({"net": state})
        assert found is not None
        assert torch.equal(found["output/output"], net._orig_mod(rows).detach())


def refuse(*_: Any) -> Any:
    raise AssertionError("it was compiled")


def test_a_net_that_cannot_answer_costs_no_checkpoint(caplog: pytest.LogCaptureFixture) -> None:
    spec = TensorSpec(name="x", dtype="float32", shape=(3,))
    signature = Signature(inputs=(spec,), outputs=(spec,), net="net")
    twin = Twin(torch.nn.Linear(3, 3), signature, [torch.zeros(2, 3)])
    assert twin.answers({"net": {"weight": torch.zeros(3, 3)}}) is None
    assert "records no answers" in caplog.text
