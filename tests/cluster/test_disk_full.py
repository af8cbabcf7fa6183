"""A disk that is full: the run stops, names what is whole, and goes on when there is room."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional

import lepton
from lepton import checkpoints
from lepton.errors import CheckpointError, LeptonError, TrainingError


@pytest.fixture
def mount() -> Iterator[Callable[[Path, str], None]]:
    """Put a file system of a size in place; a second time, change its size."""
    mounted: set[Path] = set()

    def put(folder: Path, size: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        how = f"remount,size={size}" if folder in mounted else f"size={size}"
        command = ["mount", "-t", "tmpfs", "-o", how, "lepton-test", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"file systems cannot be mounted here: {done.stderr.strip()}")
        mounted.add(folder)

    yield put
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def make_loop(at: int = -1, then: Callable[[], None] = lambda: None) -> Callable[[Any], None]:
    def loop(worker: Any) -> None:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, 40_000), torch.nn.Linear(40_000, 3))  # 1.1 MB
        worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=1e-4))
        for batch in worker.batches():
            if worker.step_number == at:
                then()
            worker.step(functional.cross_entropy(net(batch["x"]), batch["y"], reduction="sum"))

    return loop


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Any:
    x = np.random.default_rng(0).normal(size=(120, 3)).astype("float32")
    rows = pa.table({"x": list(x), "y": x.argmax(1).astype("int64")})
    return lepton.write(rows, tmp_path_factory.mktemp("lake") / "t")


def test_no_room_for_a_checkpoint(
    table: Any, tmp_path: Path, mount: Callable[[Path, str], None]
) -> None:
    folder = tmp_path / "runs/r/checkpoints"
    mount(folder, "5m")
    options: dict[str, Any] = {"home": str(tmp_path), "checkpoint_every": 2, "audit": True}
    stream = table.stream(batch_size=10, lanes=1)
    with pytest.raises(CheckpointError, match="No space left") as refused:
        lepton.train(make_loop(), stream, name="r", **options)

    whole = checkpoints.all_of(folder)
    assert whole, "some found room"
    for manifest in whole:
        checkpoints.verify(manifest)
    assert f"the last whole checkpoint is {whole[-1].uri}" in str(refused.value)
    assert f"checkpoint of step {whole[-1].step + 2}" in str(refused.value)
    found = {f"data/{p.name}" for p in (folder / "data").iterdir()}
    assert found == {f for m in whole for f in m.folders}, "the torn one is swept up"

    mount(folder, "50m")
    run = lepton.train(make_loop(), stream, name="r", **options)
    assert run.steps == 12
    assert run.attempts[-1][0].step == whole[-1].step
    assert run.consumption(stream).exact


def test_no_room_for_anything(
    table: Any, tmp_path: Path, mount: Callable[[Path, str], None]
) -> None:
    home = tmp_path / "home"
    mount(home, "40m")
    ballast = home / "ballast"

    def fill() -> None:
        with ballast.open("wb", buffering=0) as f, suppress(OSError):
            while True:
                f.write(bytes(os.statvfs(home).f_bavail * 4096 or 4096))

    options: dict[str, Any] = {"home": str(home), "checkpoint_every": 4, "audit": True}
    rows = table.stream(batch_size=6, lanes=1)
    with pytest.raises(LeptonError, match="No space left") as refused:
        lepton.train(make_loop(5, fill), rows, name="r", **options)

    assert isinstance(refused.value, TrainingError | CheckpointError)
    assert "the last whole checkpoint is" in str(refused.value)
    assert "step-00000004.json" in str(refused.value)
    ballast.unlink()
    run = lepton.train(make_loop(), rows, name="r", keep=2, **options)
    assert run.attempts[-1][0].step == 4
    assert run.consumption(rows).exact
