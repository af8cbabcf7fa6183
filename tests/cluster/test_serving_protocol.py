"""The whole protocol against a live service, with the field's own client and with plain HTTP."""

from __future__ import annotations

import gzip
import json
import os
import queue
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

import lepton
from lepton import checkpoints, ingress, serving
from lepton.errors import ServingError
from lepton.export.restore import Predictor
from lepton.preprocess import Preparation
from lepton.serving import App
from lepton.serving.inputs import MAX_BYTES
from lepton.serving.tables import MEDIA_TYPE
from lepton.telemetry import Carrier, spans_of
from lepton.training import load_run

pytestmark = pytest.mark.usefixtures("ray_cluster")
MODEL = "spoken"


def loop(worker: Any) -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    worker.attach(net=net, opt=opt)
    for batch in worker.batches():
        scores = net(batch["x"])
        worker.step(torch.nn.functional.cross_entropy(scores, batch["y"], reduction="sum"))


class Service:
    """A served model, rows for it, and what its checkpoint answers to them."""

    def __init__(self, home: Path) -> None:
        self.home = home
        x = np.random.default_rng(0).normal(5, 2, (100, 3)).astype("float32")
        rows = pa.table({"x": list(x), "y": (x.sum(1) > 15).astype("int64")})
        table = lepton.write(rows, home / "t")
        prepare = Preparation.fit(table, standard=["x"])
        stream = table.stream(batch_size=50, seed=0, transform=prepare)
        run = lepton.train(loop, stream, name="r", home=str(home))
        version = lepton.register(run, MODEL, home=str(home))
        self.app: App = lepton.promote(
            version, home=str(home), service=serving.Service(grpc_port=0)
        )
        self.x = x[:7]
        predictor = Predictor(checkpoints.load(version.checkpoint))
        self.scores = predictor(rows.select(["x"]).slice(0, 7))["output"].numpy()

    def post(self, body: bytes, **headers: str) -> httpx.Response:
        told = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.post(self.app.infer_url, content=body, headers=told, timeout=120)

    def body(self) -> bytes:
        x = {"name": "x", "datatype": "FP32", "shape": [7, 3], "data": self.x.tolist()}
        return json.dumps({"id": "a", "inputs": [x]}).encode()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Service:
    return Service(tmp_path_factory.mktemp("protocol"))


@pytest.mark.parametrize("raw_in", [True, False])
@pytest.mark.parametrize("raw_out", [True, False, None])
@pytest.mark.parametrize("packed", [None, "gzip", "deflate"])
def test_tritonclient_gets_the_checkpoints_answers(
    service: Service, raw_in: bool, raw_out: bool | None, packed: str | None
) -> None:
    triton = pytest.importorskip("tritonclient.http")
    client = triton.InferenceServerClient(service.app.url.removeprefix("http://"))
    sent = triton.InferInput("x", list(service.x.shape), "FP32")
    sent.set_data_from_numpy(service.x, binary_data=raw_in)
    wanted = raw_out
    outputs = None if wanted is None else [triton.InferRequestedOutput("output", wanted)]
    found = client.infer(
        MODEL, [sent], outputs=outputs, request_id="me", request_compression_algorithm=packed
    )

    assert np.array_equal(found.as_numpy("output"), service.scores)
    assert found.get_response()["id"] == "me"
    client.close()


def test_tritonclient_finds_server_model_and_versions(service: Service) -> None:
    triton = pytest.importorskip("tritonclient.http")
    client = triton.InferenceServerClient(service.app.url.removeprefix("http://"))

    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    assert client.is_model_ready(MODEL)
    assert client.is_model_ready(MODEL, "1")
    assert not client.is_model_ready(MODEL, "9")
    assert client.get_model_metadata(MODEL, "1") == {
        "name": MODEL,
        "versions": ["1"],
        "platform": "pytorch_torch_export",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}],
        "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1, 2]}],
    }
    sent = triton.InferInput("x", [1, 3], "FP32")
    sent.set_data_from_numpy(service.x[:1])
    assert client.infer(MODEL, [sent], model_version="1").get_response()["model_version"] == "1"
    with pytest.raises(triton.InferenceServerException, match=r"version 9 .* is not in memory"):
        client.infer(MODEL, [sent], model_version="9")
    client.close()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_tritonclient_gets_the_checkpoints_answers_by_grpc(
    service: Service, asynchronous: bool
) -> None:
    triton = pytest.importorskip("tritonclient.grpc")
    client = triton.InferenceServerClient(service.app.grpc_address)
    sent = triton.InferInput("x", list(service.x.shape), "FP32")
    sent.set_data_from_numpy(service.x)
    assert client.is_model_ready(MODEL)
    if asynchronous:
        came: Any = queue.Queue()
        client.async_infer(MODEL, [sent], lambda result, error: came.put((result, error)))
        found, error = came.get(timeout=180)
        assert error is None
    else:
        found = client.infer(MODEL, [sent], request_id="me")
        assert found.get_response().id == "me"

    assert np.array_equal(found.as_numpy("output"), service.scores)
    sent = triton.InferInput("x", [1, 2], "FP32")
    sent.set_data_from_numpy(service.x[:1, :2])
    with pytest.raises(triton.InferenceServerException, match=r"shape \[1, 2\]") as raised:
        client.infer(MODEL, [sent])
    assert raised.value.status() == "StatusCode.INVALID_ARGUMENT"
    client.close()


def test_only_who_has_a_token_is_answered(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "a-long-and-random-one"
    run = load_run("r", str(service.home))
    version = lepton.register(run, "guarded", home=service.home)
    monkeypatch.setenv("LEPTON_SERVE_TOKENS", f"me={token}")
    app = lepton.promote(version, home=str(service.home))
    try:
        rows = {"x": service.x}
        for wrong in ("", "another-long-and-random-one"):
            with pytest.raises(ServingError, match="a bearer token is needed"):
                replace(app, token=wrong).predict(rows)
        mine = replace(app, token=token)
        assert np.array_equal(mine.predict(rows)["output"], service.scores)
        known = {"authorization": f"Bearer {token}"}
        assert until_past_serve(app.infer_url, service.body(), known, 400), "none went past Serve"
        refused = httpx.post(app.infer_url, content=service.body())
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Bearer")
        assert token not in repr(mine)
    finally:
        app.close()


def counting_loop(worker: Any) -> None:
    """After token t comes t + 1, round and round."""
    net = torch.nn.Embedding(7, 7)
    with torch.no_grad():
        net.weight.copy_(torch.eye(7).roll(1, 1) * 10)
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=1e-9))
    for batch in worker.batches():
        scores = net(batch["t"])
        worker.step(torch.nn.functional.cross_entropy(scores[:, -1], batch["y"], reduction="sum"))


def test_tokens_come_one_by_one_until_the_client_leaves(service: Service) -> None:
    home = str(service.home)
    tokens = np.random.default_rng(0).integers(0, 7, (40, 4))
    rows = pa.table({"t": list(tokens), "y": (tokens[:, -1] + 1) % 7})
    table = lepton.write(rows, service.home / "tokens")
    run = lepton.train(counting_loop, table.stream(batch_size=20), name="count", home=home)
    app = lepton.promote(lepton.register(run, "count", home=home), home=home)
    trace = "ab" * 16
    try:
        assert list(app.generate([1, 2], max_tokens=6)) == [3, 4, 5, 6, 0, 1]
        asked = {"t": [1, 2], "id": "no\nheader", "parameters": {"max_tokens": 2}}
        reply = httpx.post(f"{app.url}/v2/models/count/generate", json=asked, timeout=60)
        assert (reply.status_code, reply.json()["id"]) == (200, asked["id"])
        assert len(reply.headers.get_list("x-request-id")) == 1
        carrier = Carrier(f"00-{trace}-{'cd' * 8}-01", f"{home}/traces")
        endless = app.generate([1], max_tokens=4096, trace=carrier)
        assert [next(endless) for _ in range(3)] == [2, 3, 4]
        endless.close()  # leaves
        end = time.monotonic() + 180
        while not (spans := spans_of(f"{home}/traces", trace)) and time.monotonic() < end:
            time.sleep(0.1)
        (span,) = spans
        assert span.attributes["http.response.status_code"] in (200, 499)  # it may be that quick
        with pytest.raises(ServingError, match="gives no sequences"):
            next(service.app.generate([1]))
    finally:
        app.close()


def test_arrow_streams_in_and_out(service: Service) -> None:
    table = pa.table({"x": list(service.x)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)
    whole = sink.getvalue().to_pybytes()
    reply = service.post(
        gzip.compress(whole),
        content_type=MEDIA_TYPE,
        content_encoding="gzip",
        x_request_id="b",
    )

    assert reply.headers["content-type"] == MEDIA_TYPE
    with pa.ipc.open_stream(reply.content) as stream:
        found: Any = stream.read_all()
    assert found.schema.metadata[b"id"] == b"b"
    assert np.array_equal(found["output"].combine_chunks().flatten(), service.scores.reshape(-1))
    as_json = service.post(whole, content_type=MEDIA_TYPE, accept="application/json")
    assert np.allclose(as_json.json()["outputs"][0]["data"], service.scores.reshape(-1))
    as_stream = service.post(service.body(), accept=MEDIA_TYPE)
    with pa.ipc.open_stream(as_stream.content) as stream:
        assert stream.read_all().schema.metadata[b"id"] == b"a"


def test_problems_have_details(service: Service) -> None:
    url = service.app.url
    wrong = {
        400: service.post(b"{"),
        404: httpx.get(f"{url}/v2/models/other"),
        405: httpx.get(service.app.infer_url),
        413: service.post(gzip.compress(bytes(MAX_BYTES + 1)), content_encoding="gzip"),
        415: service.post(b"{}", content_encoding="br"),
    }
    for status, reply in wrong.items():
        assert reply.status_code == status
        assert reply.headers["content-type"] == "application/problem+json"
        assert reply.json()["status"] == status
        assert reply.json()["detail"]
    large = service.post(b" " * (MAX_BYTES + 1))
    assert large.status_code == 413
    assert service.post(service.body()).status_code == 200


def test_quick_requests_go_past_serve(service: Service) -> None:
    assert until_past_serve(service.app.infer_url, service.body(), {}, 400), "none went past Serve"
    refused = service.post(b"{}")
    assert refused.status_code == 400
    assert refused.headers["content-type"] == "application/problem+json"


def until_past_serve(url: str, body: bytes, headers: dict[str, str], wait_s: float) -> bool:
    """Ask until a request is answered at once (Serve would make up a request id), or time is up."""
    if not ray.get(haproxy_is_on.remote()):
        return True
    end = time.monotonic() + wait_s
    while httpx.post(url, content=body, headers=headers).headers["x-request-id"] != "a":
        if time.monotonic() > end:
            return False
    return True


@ray.remote(num_cpus=0)
def haproxy_is_on() -> bool:
    return os.environ.get(ingress.SWITCH) == "1"
