"""A version goes to MLflow and comes back the same; needs MLflow (``lepton[mlflow]``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import lepton
from lepton import checkpoints
from lepton.errors import RegistryError
from lepton.export.mlflow_registry import MARK, export_version, import_version
from lepton.export.recorded import compare
from lepton.export.restore import Predictor
from lepton.registry import Registry


def loop(worker: Any) -> None:
    net = torch.nn.Linear(3, 2)
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
    for batch in worker.batches():
        scores = net(batch["x"])
        worker.step(torch.nn.functional.cross_entropy(scores, batch["y"], reduction="sum"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    x = np.random.default_rng(0).normal(size=(60, 3)).astype("float32")
    rows = pa.table({"x": list(x), "y": (x.sum(1) > 0).astype("int64")})
    table = lepton.write(rows, home / "t")
    run = lepton.train(loop, table.stream(batch_size=20), name="r", home=str(home))
    judged = lepton.evaluate(run, table, label="y", home=str(home))
    lepton.register(run, "m", metrics=judged, tags={"owner": "me"}, home=home)
    registry = Registry(f"{home}/registry")
    registry.promote("m", 1, expect=None)
    registry.alias("m", "best", 1)
    registry.describe("m", 1, note="the first")
    return home


def test_without_mlflow_it_is_said(home: Path) -> None:
    try:
        import mlflow  # noqa: F401
    except ImportError:
        for move in (export_version, import_version):
            with pytest.raises(RegistryError, match="MLflow is not installed"):
                move("m", 1, home=home)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_version_goes_there_and_comes_back_the_same(home: Path, tmp_path: Path) -> None:
    mlflow: Any = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow.MlflowClient(uri, uri)
    client.create_experiment("lepton/m", artifact_location=f"file://{tmp_path}/artifacts")
    there = export_version("m", home=home, tracking_uri=uri)
    again = export_version("m", home=home, tracking_uri=uri)
    mine = Registry(f"{home}/registry").version("m", 1)

    assert there.version == again.version
    assert there.tags["owner"] == "me"
    assert there.tags[MARK] == mine.manifest_sha256
    assert there.description == "the first"
    assert client.get_model_version_by_alias("m", "champion").version == there.version
    assert client.get_model_version_by_alias("m", "best").version == there.version
    run = client.get_run(there.run_id)
    assert run.data.metrics["accuracy"] == mine.metrics["accuracy"]
    assert run.data.params["table_version"] == "0"

    other = tmp_path / "other"
    entry = import_version("m", "best", home=other, tracking_uri=uri)
    assert import_version("m", there.version, home=other, tracking_uri=uri) == entry
    assert entry.manifest_sha256 == mine.manifest_sha256
    assert (entry.metrics, entry.measured) == (mine.metrics, mine.measured)
    assert (entry.note, entry.tags, entry.signature) == (mine.note, mine.tags, mine.signature)
    assert entry.lineage["imported_from"] == f"models:/m/{there.version}"
    manifest = checkpoints.load(entry.checkpoint)
    assert str(other) in manifest.uri
    compare(Predictor(manifest).program, manifest)

    client.create_model_version("m", "somewhere", run_id=there.run_id)
    with pytest.raises(RegistryError, match="was not exported by lepton"):
        import_version("m", 2, home=other, tracking_uri=uri)
    with pytest.raises(RegistryError, match="version 9 cannot be had"):
        import_version("m", 9, home=other, tracking_uri=uri)
