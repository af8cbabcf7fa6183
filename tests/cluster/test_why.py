"""From an answer over HTTP back to the table, and a trace's page in a browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch

import lepton
from lepton.cli import main
from lepton.registry import ModelVersion
from lepton.serving.protocol import request_of
from lepton.training import Run, load_run
from tests.cluster.chromium import open_page

pytestmark = pytest.mark.usefixtures("ray_cluster")
ASKED = "asked-by-a-test"


def loop(worker: lepton.Worker) -> None:
    net = torch.nn.Linear(3, 2)
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
    for batch in worker.batches():
        scores = net(batch["x"])
        worker.step(torch.nn.functional.cross_entropy(scores, batch["y"], reduction="sum"))


@dataclass(frozen=True)
class World:
    """A run, the model version it became, and one request that this version answered."""

    home: Path
    run: Run
    model: ModelVersion


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Iterator[World]:
    home = tmp_path_factory.mktemp("why")
    x = np.random.default_rng(0).normal(size=(200, 3)).astype("float32")
    lepton.write(pa.table({"x": list(x), "y": x.argmax(1) % 2}), home / "lake" / "asked")
    table = lepton.write(pa.table({"x": list(x), "y": x.argmax(1) % 2}), home / "lake" / "asked")
    lepton.train(loop, table.stream(batch_size=50, epochs=3), name="r", home=home)
    run = load_run("r", str(home))
    found = lepton.evaluate(run, table, label="y", home=str(home))
    model = lepton.register(run, "asked", metrics=found.metrics, home=home)
    lepton.write(pa.table({"x": list(x), "y": x.argmax(1) % 2}), home / "lake" / "asked")
    app = lepton.promote(model, home=str(home))
    inputs = [{"name": "x", "shape": [-1, 3], "datatype": "FP32"}]
    body = json.loads(request_of(pa.table({"x": list(x[:5])}), inputs))
    reply = httpx.post(app.infer_url, json={**body, "id": ASKED}, timeout=180)
    assert reply.status_code == 200, reply.text
    app.flush()
    yield World(home, run, model)
    app.close()


def told(world: World, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments, "--home", str(world.home)]) == 0
    return capsys.readouterr().out


def test_an_answer_leads_back_to_the_table(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    way = json.loads(told(world, capsys, "why", ASKED, "--json"))
    stages: dict[str, Any] = {s["stage"]: s for s in way["stages"]}

    assert way["whole"], way
    assert stages["answer"]["status"] == 200
    assert stages["model"]["now"] == ["champion"]
    assert stages["checkpoint"]["sha256"] == world.model.manifest_sha256
    assert stages["run"]["trace_id"] == world.run.trace_id
    assert stages["evaluation"]["rows"] == 400
    assert stages["table"]["name"] == f"{world.home}/lake/asked@1"
    assert (stages["table"]["files"], stages["table"]["rows"]) == (2, 400)


def test_the_request_and_the_run_are_linked_both_ways(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    request = told(world, capsys, "trace", ASKED)
    run = told(world, capsys, "trace", "r")

    assert f"links to trace {world.run.trace_id}: lepton.checkpoint" in request
    assert "version 1, variant champion, rows 5" in request
    assert "linked from trace" in run
    assert "lepton.request" in run.rpartition("linked from trace")[2]


def test_the_page_opens_in_a_browser_without_a_network(
    world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target = tmp_path / "trace.html"
    told(world, capsys, "trace", "r", "--html", str(target))
    source = target.read_text()
    page = open_page(target, tmp_path)

    assert "http:" not in source
    assert "https:" not in source
    assert page.console == ""
    assert "lepton.request (asked version 1)" in page.dom
    assert page.dom.count("<polyline") == 2
    assert len(page.screenshot) > 20_000
