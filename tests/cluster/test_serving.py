"""A served model's answers, with a real Ray Serve and real HTTP clients."""

from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

import lepton
from lepton import checkpoints
from lepton.errors import ServingError
from lepton.export.restore import Predictor
from lepton.monitoring import count_answers
from lepton.serving import score
from tests.cluster.world import World, post, request, wait_until

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_answers_are_those_of_the_checkpoint_and_are_logged(world: World) -> None:
    rows = world.table.head(7)
    before = count_answers("m", world.home)
    served = world.app.predict(rows)["output"]

    manifest = checkpoints.load(world.champion().checkpoint)
    assert np.array_equal(served, Predictor(manifest)(rows)["output"].numpy())
    wait_until(lambda: count_answers("m", world.home) == before + 1)
    log = lepton.table(f"{world.home}/answers/m").to_arrow().to_pandas()
    assert len(log[log["row"] == 6]) == 1


@pytest.mark.parametrize(
    "body",
    [
        "no json",
        "[]",
        "{}",
        '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}',
        '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, "a"]}]}',
        '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, NaN]}]}',
        '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, null]}]}',
        '{"inputs": [{"name": "x", "datatype": "INT64", "shape": [1, 3], "data": [1, 2, 3]}]}',
        '{"inputs": [{"name": "q", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}]}',
    ],
)
def test_a_wrong_request_is_told_what_was_expected(world: World, body: str) -> None:
    reply = post(world.app, body)

    assert reply.status_code == 400
    assert "error" in reply.json()


def test_a_request_continues_the_callers_trace(world: World) -> None:
    header = f"00-{'ab' * 16}-{'cd' * 8}-01"
    reply = httpx.post(
        world.app.infer_url, content=request(world), headers={"traceparent": header}, timeout=120
    )

    assert reply.headers["traceparent"].split("-")[1] == "ab" * 16


def test_any_form_of_rows_gets_the_same_answer(world: World) -> None:
    rows = world.table.select(["x"]).head(5)
    expected = world.app.predict(rows)["output"]
    x = np.array(rows["x"].to_pylist(), "float32")

    for given in (rows.to_pandas(), {"x": x}, {"x": torch.from_numpy(x)}, {"x": x.tolist()}):
        assert np.array_equal(world.app.predict(given)["output"], expected)
    with pytest.raises(ServingError, match=r"rows of shape \(2,\), wanted \(3,\)"):
        world.app.predict({"x": x[:, :2]})
    with pytest.raises(ServingError, match=r"\['x'\], which are not given"):
        world.app.predict({"y": x})


def test_after_a_flush_the_log_has_every_answer(world: World) -> None:
    world.app.flush()
    before = count_answers("m", world.home)
    for _ in range(3):
        world.app.predict(world.table.head(2))
    world.app.flush()

    assert count_answers("m", world.home) == before + 3


def test_a_whole_table_is_answered_by_the_same_code(world: World, tmp_path: Path) -> None:
    rows = world.table.where("y = 1")
    once = ("nightly", 1)
    for _ in range(2):
        found = score("m", rows, tmp_path / "out", version=2, txn=once, home=world.home)
    predictor = Predictor(checkpoints.load(world.versions[1].checkpoint))
    expected = predictor(rows.to_arrow())["output"].numpy()

    table = found.to_arrow()
    assert len(table) == rows.count_rows() < world.table.count_rows()
    assert set(table["model_version"].to_pylist()) == {2}
    order = np.argsort([tuple(x) for x in table["x"].to_pylist()], axis=0)[:, 0]
    mine = np.argsort([tuple(x) for x in rows.to_arrow()["x"].to_pylist()], axis=0)[:, 0]
    answers = np.array(table["answer_output"].to_pylist())
    assert np.allclose(answers[order], expected[mine], atol=1e-6)
    with pytest.raises(ServingError, match=r"takes columns \['x'\]"):
        score("m", world.table.select(["y"]), tmp_path / "no", home=world.home)
    with pytest.raises(ServingError, match="already"):
        score("m", found, tmp_path / "no", home=world.home)
