"""Checkpoints on S3, by a real server: whole or invisible, and everything works from there."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional

import lepton
from lepton import checkpoints
from lepton.errors import CheckpointError, TrainingError
from lepton.export.restore import Predictor
from lepton.registry import Registry
from lepton.serving.following import Follower
from lepton.telemetry import Carrier
from tests.cluster.test_checkpoints import WRITER
from tests.unit.test_shards import write as write_in_parts

pytest.importorskip("obstore")

CURSOR = {"v": 1, "epoch": 0, "rows": 0, "order": ""}


@pytest.fixture(autouse=True)
def own_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/lepton/checkpoints"


def save(
    where: str, step: int, options: dict[str, str], value: float = 1.0
) -> checkpoints.Manifest:
    state = {"net": {"w": torch.full((1000,), value)}}
    return checkpoints.save(where, step=step, state=state, cursor=CURSOR, options=options)


@pytest.mark.parametrize("trouble", ["", "busy", "lost"])
def test_what_goes_in_comes_out(options: dict[str, str], trouble: str) -> None:
    where = f"s3://lake/there/{trouble or 'well'}/r"
    saved = [save(where, step, options, step) for step in (1, 2, 3)]

    assert checkpoints.all_of(where, options) == saved
    assert checkpoints.latest(where, options) == saved[2]
    assert torch.equal(checkpoints.restore(saved[1])["net"]["w"], torch.full((1000,), 2.0))
    assert checkpoints.prune(where, options) == 0
    checkpoints.remove(saved[2])
    assert checkpoints.latest(where, options) == saved[1]
    assert "open-sesame" not in repr(saved)


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
def test_a_damaged_one_is_refused_and_passed_over(options: dict[str, str], harm: str) -> None:
    where = f"s3://lake/harm-{harm}"
    good, bad = save(where, 1, options), save(where, 2, options, 2)
    storage, name = bad.storage, f"{bad.folder}/{checkpoints.STATE}"
    body = storage.read(name)
    if harm == "remove":
        storage.remove(name)
    else:
        other = body[:-1] if harm == "truncate" else body[:-1] + bytes([body[-1] ^ 1])
        storage.replace(name, other)

    assert checkpoints.latest(where, options) == good
    with pytest.raises(CheckpointError, match=rf"{bad.folder}/{checkpoints.STATE}"):
        checkpoints.restore(bad)


def test_a_writer_killed_at_any_moment_leaves_only_whole_checkpoints(
    options: dict[str, str],
) -> None:
    where = "s3://lake/killed"
    for life in range(3):
        before = checkpoints.latest(where, options)
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, where, str(before.step if before else 0)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **options},
        )
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(2 + life)]
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()

        for manifest in checkpoints.all_of(where, options):
            checkpoints.verify(manifest)
        newest = checkpoints.latest(where, options)
        assert newest is not None or life == 0
        if lines[-1].strip().isdigit():
            assert newest is not None
            assert newest.step >= int(lines[-1])
        checkpoints.prune(where, options)
        folders = {m.folder for m in checkpoints.all_of(where, options)}
        assert newest is None or newest.folder in folders


def test_of_two_writers_of_one_step_one_wins(options: dict[str, str]) -> None:
    where = "s3://lake/race"
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda v: save(where, 7, options, v), (1.0, 2.0, 3.0, 4.0)))

    assert len({m.sha256 for m in made}) == 1
    assert checkpoints.all_of(where, options) == made[:1]
    checkpoints.verify(made[0])
    assert checkpoints.prune(where, options) == 3


def test_a_sharded_one_lies_in_parts_there_too(
    options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in options.items():
        monkeypatch.setenv(name, value)
    whole = torch.arange(35.0).reshape(7, 5)
    manifest = write_in_parts("s3://lake/sharded", whole, (3, 1))

    assert checkpoints.latest("s3://lake/sharded") == manifest
    assert torch.equal(checkpoints.restore(manifest)["net"]["w"], whole)
    manifest.storage.remove(f"{manifest.folder}/shard-0001.safetensors")
    assert checkpoints.latest("s3://lake/sharded", thorough=False) is None


def test_a_storage_that_cannot_be_reached_is_no_empty_one(options: dict[str, str]) -> None:
    with pytest.raises(CheckpointError, match="s3://no-such-bucket/r"):
        checkpoints.latest("s3://no-such-bucket/r", options)
    with pytest.raises(CheckpointError, match="cannot reach checkpoints on ftp://x/y"):
        checkpoints.latest("ftp://x/y")


def make_loop(fail_at: int = -1) -> Any:
    def loop(worker: Any) -> None:
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 3)
        worker.attach(net=net, opt=torch.optim.Adam(net.parameters(), lr=0.01))
        for batch in worker.batches():
            if worker.step_number == fail_at:
                raise RuntimeError("the power went out")
            worker.step(functional.cross_entropy(net(batch["x"]), batch["y"], reduction="sum"))

    return loop


def test_train_resume_keep_register_evaluate_and_serve_from_s3(
    options: dict[str, str],
    own_copies: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = str(tmp_path)
    x = np.random.default_rng(0).normal(size=(200, 3)).astype("float32")
    table = lepton.write(pa.table({"x": list(x), "y": x.argmax(1).astype("int64")}), f"{home}/t")
    stream = table.stream(batch_size=10, lanes=1)
    there: dict[str, Any] = {"checkpoints": "s3://lake/runs", "storage_options": options}
    usual: dict[str, Any] = {"home": home, "checkpoint_every": 4}
    whole = lepton.train(make_loop(), stream, name="here", **usual)
    with pytest.raises(RuntimeError, match="power"):
        lepton.train(make_loop(10), stream, name="r", **usual, **there)
    with pytest.raises(TrainingError, match="has its checkpoints in s3://lake/runs/r"):
        lepton.train(make_loop(), stream, name="r", checkpoints="s3://lake/other", **usual)
    run = lepton.train(make_loop(), stream, name="r", keep=2, storage_options=options, **usual)

    assert run.checkpoint.uri == "s3://lake/runs/r/step-00000020.json"
    assert not (tmp_path / "runs/r/checkpoints").exists()
    assert run.attempts[-1][0].step == 8
    assert [m.step for m in run.checkpoints][-2:] == [16, 20]
    assert len(run.checkpoints) <= 3, "two newest, and the best"
    assert "open-sesame" not in (tmp_path / "runs/r/run.json").read_text() + repr(run)
    weights = checkpoints.restore(whole.checkpoint)["net"]
    for name, value in checkpoints.restore(run.checkpoint)["net"].items():
        assert torch.equal(value, weights[name])

    for name, value in options.items():
        monkeypatch.setenv(name, value)  # what others go by: the registry holds no secrets
    accuracy = lepton.evaluate(run, table, label="y", home=home).metrics["accuracy"]
    assert accuracy == lepton.evaluate(whole, table, label="y", home=home).metrics["accuracy"]
    model = lepton.register(run, "m", home=home)
    assert model.checkpoint == run.checkpoint.uri
    registry = Registry(f"{home}/registry")
    registry.promote("m", 1, expect=registry.state("m").pointer.seq, gate=[], trace_id="")
    served = Follower("m", home, Carrier())
    rows = table.to_arrow().select(["x"]).slice(0, 5)
    expected = Predictor(whole.checkpoint)(rows)["output"].numpy()
    assert (served.now.champion.run(rows)["output"] == expected).all()
    served.close()

    copy = run.checkpoint.path(checkpoints.PROGRAM)
    assert copy.is_relative_to(own_copies)
    copy.write_bytes(b"?")
    assert (Predictor(run.checkpoint)(rows)["output"].numpy() == expected).all()
    assert copy.read_bytes() != b"?", "a copy that does not match is fetched again"
    registered = checkpoints.load(model.checkpoint)
    registered.storage.remove_folder(registered.folder)
    assert (Predictor(registered)(rows)["output"].numpy() == expected).all(), "from its copies"


def test_checkpoints_elsewhere_are_at_a_url(tmp_path: Path) -> None:
    table = lepton.write(pa.table({"x": [1.0]}), tmp_path / "t")
    with pytest.raises(ValueError, match="must be a URL such as s3://bucket/prefix"):
        lepton.train(
            make_loop(),
            table.stream(batch_size=1),
            name="r",
            home=str(tmp_path),
            checkpoints="/elsewhere",
        )
