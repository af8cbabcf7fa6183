"""Torch the way people write it learns under lepton what it learns in a bare loop. No Ray."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

import lepton
from lepton.lake import Snapshot
from tests.unit.ways import WAYS, compiled_loop


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    x = np.random.default_rng(0).normal(size=(330, 3)).astype("float32")
    rows = pa.table({"x": list(x), "y": x.argmax(1).astype("int64")})
    return lepton.write(rows, tmp_path_factory.mktemp("lake") / "t")


@pytest.mark.parametrize("way", list(WAYS))
def test_it_learns_what_a_bare_loop_learns(table: Snapshot, tmp_path: Path, way: str) -> None:
    loop, bare, apart = WAYS[way]
    stream = table.stream(batch_size=40, epochs=2, lanes=2)
    torch.manual_seed(0)
    expected = list(bare(stream.shard(0, 1)))
    run = lepton.train(loop, stream, name="r", home=str(tmp_path))

    assert len(expected) == stream.steps
    assert run.losses == pytest.approx(expected, rel=apart)
    assert expected[-1] < expected[0]


def test_a_compiled_net_is_kept_under_plain_names_and_can_serve(
    table: Snapshot, tmp_path: Path
) -> None:
    stream = table.stream(batch_size=40, lanes=1)
    run = lepton.train(compiled_loop, stream, name="r", home=str(tmp_path))
    state = lepton.checkpoints.restore(run.checkpoint)["net"]

    assert list(state) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert run.checkpoint.program_error is None
    assert lepton.evaluate(run, table, label="y", home=str(tmp_path)).rows == 330
