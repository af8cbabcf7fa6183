"""OpenLineage events of a run: what the specification asks for, to a file and to a receiver."""

import json
import uuid
from collections.abc import Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow as pa
import pytest
import torch

import lepton
from lepton.cli import main
from lepton.report.openlineage import Lineage, dataset_at, events
from lepton.training import load_run


class Receiver(HTTPServer):
    """Keeps what is posted to it, and answers with a status of one's choice."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Posts)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.status = 201
        self.got: list[tuple[str, str | None, dict[str, Any]]] = []


class Posts(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.got.append((self.path, self.headers["authorization"], json.loads(body)))
        self.send_response(self.server.status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its parent's name
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def loop(worker: lepton.Worker) -> None:
    net = torch.nn.Linear(1, 1)
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
    for batch in worker.batches():
        worker.step(net(batch["x"]).square().sum())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lineage")
    data = pa.table({"x": pa.array([[0.5], [1.5]] * 4, pa.list_(pa.float32()))})
    lepton.write(data, folder / "lake")
    rows = lepton.write(data, folder / "lake")
    run = lepton.train(loop, rows.stream(batch_size=8), name="r", home=folder)
    lepton.register(run, "m", metrics={"f1": 1.0}, home=folder)
    return folder


def check(event: dict[str, Any]) -> None:
    """What the specification's schema requires of a run event and its facets."""
    assert event["eventType"] in ("START", "RUNNING", "COMPLETE", "ABORT", "FAIL", "OTHER")
    assert datetime.fromisoformat(event["eventTime"]).tzinfo is not None
    assert ":" in event["producer"]
    assert event["schemaURL"].startswith("https://openlineage.io/spec/")
    assert str(uuid.UUID(event["run"]["runId"])) == event["run"]["runId"]
    named = [event["job"], *event["inputs"], *event["outputs"]]
    for thing in named:
        assert thing["namespace"]
        assert thing["name"]
    for thing in (event["run"], *named):
        for facet in thing["facets"].values():
            assert ":" in facet["_producer"]
            assert facet["_schemaURL"].startswith("https://openlineage.io/spec/facets/")
    for dataset in event["inputs"] + event["outputs"]:
        assert isinstance(dataset["facets"]["version"]["datasetVersion"], str)
    assert {"processingType", "integration"} <= set(event["job"]["facets"]["jobType"])
    assert event["run"]["facets"]["processing_engine"]["version"] == lepton.__version__
    assert all({"key", "value"} <= set(t) for t in event["run"]["facets"]["tags"]["tags"])


def test_a_run_is_told_to_a_receiver(
    home: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENLINEAGE_API_KEY", "secret")
    for _ in range(2):
        assert main(["lineage", "r", "--openlineage", receiver.url, "--home", str(home)]) == 0
    (start, complete), again = [[e for _, _, e in receiver.got[i : i + 2]] for i in (0, 2)]
    run = load_run("r", str(home))

    assert {(path, key) for path, key, _ in receiver.got} == {("/api/v1/lineage", "Bearer secret")}
    assert again == [start, complete]
    for event in (start, complete):
        check(event)
        (table,) = event["inputs"]
        assert (table["namespace"], table["name"]) == ("file", f"{home}/lake")
        assert table["facets"]["version"]["datasetVersion"] == "1"
        assert table["facets"]["storage"]["storageLayer"] == "delta"
        assert table["facets"]["schema"]["fields"][0]["name"] == "x"
    assert [e["eventType"] for e in (start, complete)] == ["START", "COMPLETE"]
    assert start["run"]["runId"] == complete["run"]["runId"]
    assert start["eventTime"] <= complete["eventTime"]
    assert start["outputs"] == []
    assert [
        (o["namespace"], o["name"], o["facets"]["version"]["datasetVersion"])
        for o in complete["outputs"]
    ] == [("file", run.checkpoint.uri, run.checkpoint.sha256), ("lepton", "m", "1")]


def test_a_file_has_a_line_an_event(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "events.jsonl"
    assert main(["lineage", "r", "--openlineage", str(target), "--home", str(home)]) == 0
    assert "2 events to" in capsys.readouterr().out
    assert main(["lineage", "r", "--home", str(home)]) == 0

    assert capsys.readouterr().out == target.read_text()
    for line in target.read_text().splitlines():
        check(json.loads(line))


def test_a_receiver_that_refuses_is_named(
    home: Path, receiver: Receiver, capsys: pytest.CaptureFixture[str]
) -> None:
    receiver.status = 500
    target = f"{receiver.url}/own/path"
    assert main(["lineage", "r", "--openlineage", target, "--home", str(home)]) == 1

    assert f"{target} did not take event 1 of 2" in capsys.readouterr().err
    assert [path for path, _, _ in receiver.got] == ["/own/path"]
    assert main(["lineage", "none", "--home", str(home)]) == 1
    assert "there are: ['r']" in capsys.readouterr().err


def test_an_unfinished_run_has_only_begun() -> None:
    begun = Lineage(run="r", namespace="n", trace_id="t", version="1", began=5.0, ended=None)

    assert [e["eventType"] for e in events(begun)] == ["START"]


@pytest.mark.parametrize(
    ("uri", "namespace", "name"),
    [
        ("/data/t", "file", "/data/t"),
        ("file:///data/t", "file", "/data/t"),
        ("s3://bucket/a/t/", "s3://bucket", "a/t"),
    ],
)
def test_datasets_are_named_as_the_specification_has_it(
    uri: str, namespace: str, name: str
) -> None:
    found = dataset_at(uri, "3")

    assert (found.namespace, found.name, found.version) == (namespace, name, "3")
