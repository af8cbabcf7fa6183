"""gRPC beside HTTP: the protocol's own messages, and the field's own client against a replica."""

from __future__ import annotations

import asyncio
import json
import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pytest
import torch

import lepton
from lepton import cluster
from lepton.errors import ServingError
from lepton.registry import Registry
from lepton.serving import Service, grant, shortcut
from lepton.serving.grpc_messages import MESSAGES, body_of
from lepton.serving.grpc_server import CODES, Listener
from lepton.serving.inputs import BadRequest, input_of
from lepton.serving.outcome import RPC_CODES
from lepton.serving.protocol import inquiry_of
from lepton.serving.shared import SharedReplica
from lepton.telemetry import SpanRecord, spans_of
from lepton.telemetry.conventions import strays

triton = pytest.importorskip("tritonclient.grpc")


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
    lepton.register(run, "m", metrics={}, home=str(home))
    Registry(f"{home}/registry").promote("m", 1, expect=None)
    return home


class Here(SharedReplica):
    """Ended by the scene, as by Serve; not again when it is collected."""

    def __del__(self) -> None:  # type: ignore[override]
        pass


def speak(home: Path, scene: Callable[[Any], Any], **settings: Any) -> Any:
    """Run a scene of a blocking client against a replica that listens."""

    async def play() -> Any:
        port = cluster.free_ports(1)[0]
        replica = Here.__new__(Here)
        settled = Service(grpc_port=port, **settings)
        await SharedReplica.__init__(replica, ["m"], str(home), None, settled)
        client = triton.InferenceServerClient(f"127.0.0.1:{port}")
        try:
            return await asyncio.to_thread(scene, client)
        finally:
            await asyncio.to_thread(client.close)
            await SharedReplica.__del__(replica)

    return asyncio.run(play())


def requests_of(home: Path, trace: str) -> list[SpanRecord]:
    return [s for s in spans_of(str(home / "traces"), trace) if s.name == "lepton.request"]


def given(values: Any, datatype: str = "FP32") -> Any:
    array = np.array(values, "float32" if datatype == "FP32" else "int64")
    sent = triton.InferInput("x", list(array.shape), datatype)
    sent.set_data_from_numpy(array)
    return sent


def test_the_messages_are_the_protocols() -> None:
    from tritonclient.grpc import service_pb2

    for name, mine in MESSAGES.items():
        theirs: Any = service_pb2
        for part in name.split("."):
            theirs = getattr(theirs, part)
        told = [{(f.name, f.number, f.type) for f in m.DESCRIPTOR.fields} for m in (mine, theirs)]
        assert told[0] == told[1], name


def test_tritonclient_finds_server_and_model(home: Path) -> None:
    def scene(client: Any) -> None:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("m")
        assert client.is_model_ready("m", "1")
        assert not client.is_model_ready("m", "9")
        assert not client.is_model_ready("other")
        server = client.get_server_metadata(as_json=True)
        assert (server["name"], server["extensions"]) == ("lepton", ["binary_tensor_data"])
        model = client.get_model_metadata("m", as_json=True)
        assert model["inputs"] == [{"name": "x", "datatype": "FP32", "shape": ["-1", "3"]}]
        assert model["versions"] == ["1"]

    speak(home, scene)


def test_tritonclient_gets_the_replicas_answers(home: Path) -> None:
    x = [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    trace = "a" * 32

    def scene(client: Any) -> None:
        headers = {"traceparent": f"00-{trace}-{'b' * 16}-01"}
        found = client.infer("m", [given(x)], request_id="me", headers=headers)
        wanted = [triton.InferRequestedOutput("output")]
        again = client.infer("m", [given(x)], model_version="1", outputs=wanted)
        assert found.get_response().id == "me"
        assert found.get_response().model_version == "1"
        assert found.as_numpy("output").shape == (2, 2)
        assert np.array_equal(found.as_numpy("output"), again.as_numpy("output"))

    speak(home, scene)
    (span,) = requests_of(home, trace)
    assert span.parent_id == "b" * 16
    assert strays(span.name, span.attributes) == []
    told = {k: v for k, v in span.attributes.items() if not k.startswith("lepton.")}
    assert told == {
        "rpc.system": "grpc",
        "rpc.service": "inference.GRPCInferenceService",
        "rpc.method": "ModelInfer",
        "rpc.grpc.status_code": 0,
    }


def test_a_refused_call_has_the_status_that_its_client_gets(home: Path) -> None:
    traces = {"ModelInfer": "1" * 32, "ModelStreamInfer": "2" * 32}

    def scene(client: Any) -> None:
        wrong = given([[0.0, 1.0]])
        told = {m: {"traceparent": f"00-{t}-{'b' * 16}-01"} for m, t in traces.items()}
        with pytest.raises(triton.InferenceServerException):
            client.infer("m", [wrong], headers=told["ModelInfer"])
        answers: queue.Queue[Any] = queue.Queue()
        client.start_stream(
            lambda result, error: answers.put(error or result), headers=told["ModelStreamInfer"]
        )
        client.async_stream_infer("m", [wrong])
        assert "shape" in str(answers.get(timeout=30))
        client.stop_stream()

    speak(home, scene)
    for method, trace in traces.items():
        (span,) = requests_of(home, trace)
        assert span.attributes["rpc.method"] == method
        assert span.attributes["rpc.grpc.status_code"] == 3
        assert (span.status, span.attributes["error.type"]) == ("ok", "BadRequest")


def test_the_codes_in_spans_are_those_that_are_answered() -> None:
    assert {status: code.value[0] for status, code in CODES.items()}.items() <= RPC_CODES.items()
    assert RPC_CODES[500] == grpc.StatusCode.INTERNAL.value[0]
    assert RPC_CODES[499] == grpc.StatusCode.CANCELLED.value[0]


@pytest.mark.parametrize(
    ("model", "version", "x", "code", "words"),
    [
        ("m", "", given([[0.0, 1.0]]), "INVALID_ARGUMENT", "shape"),
        ("m", "", given([[0, 1, 2]], "INT64"), "INVALID_ARGUMENT", "has datatype 'INT64'"),
        ("m", "", given([[0.0, 1.0, np.nan]]), "INVALID_ARGUMENT", "must be finite"),
        ("m", "9", given([[0.0, 1.0, 2.0]]), "NOT_FOUND", "version 9"),
        ("other", "", given([[0.0, 1.0, 2.0]]), "NOT_FOUND", "there is no POST"),
    ],
)
def test_what_is_wrong_is_told_with_its_status(
    home: Path, model: str, version: str, x: Any, code: str, words: str
) -> None:
    def scene(client: Any) -> None:
        with pytest.raises(triton.InferenceServerException, match=words) as raised:
            client.infer(model, [x], model_version=version)
        assert raised.value.status() == f"StatusCode.{code}"

    speak(home, scene)


def streamed(client: Any, asked: list[dict[str, Any]], **options: Any) -> list[Any]:
    """Send requests over one stream; return what came for each, a result or an error."""
    came: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: came.put(error or result), **options)
    for one in asked:
        client.async_stream_infer("m", **one)
    found = [came.get(timeout=60) for _ in asked]
    client.stop_stream()
    assert came.empty()
    return found


def test_a_stream_answers_each_request_in_order(home: Path) -> None:
    rows = [[[float(i), 1.0, 2.0]] * (i % 3 + 1) for i in range(40)]
    asked = [{"inputs": [given(x)], "request_id": f"r{i}"} for i, x in enumerate(rows)]
    asked[7] = {"inputs": [given([[0.0, 1.0]])], "request_id": "wrong"}
    asked[9] = {"inputs": [given(rows[9])], "model_version": "9"}

    def scene(client: Any) -> None:
        alone = [client.infer("m", [given(x)]).as_numpy("output") for x in rows]
        found = streamed(client, asked)
        for i, one in enumerate(found):
            if i in (7, 9):
                words = "has shape" if i == 7 else "version 9"
                assert isinstance(one, triton.InferenceServerException)
                assert words in one.message()
            else:
                assert one.get_response().id == f"r{i}"
                assert np.allclose(one.as_numpy("output"), alone[i], atol=1e-6)

    speak(home, scene)


def test_a_stream_without_a_token_is_ended(home: Path) -> None:
    x = {"inputs": [given([[0.0, 1.0, 2.0]])]}

    def scene(client: Any) -> None:
        (refused,) = streamed(client, [x], headers={"authorization": "Bearer wrong"})
        assert refused.status() == "StatusCode.UNAUTHENTICATED"
        (found,) = streamed(client, [x], headers={"authorization": f"Bearer {'t' * 20}"})
        assert found.as_numpy("output").shape == (1, 2)

    speak(home, scene, access=(grant("me", "t" * 20),))


def test_who_has_no_token_is_refused_by_grpc_too(home: Path) -> None:
    token, other = "t" * 20, "o" * 20
    x = given([[0.0, 1.0, 2.0]])

    def scene(client: Any) -> None:
        assert client.is_server_live()
        for headers, code in (
            (None, "UNAUTHENTICATED"),
            ({"authorization": "Bearer wrong"}, "UNAUTHENTICATED"),
            ({"authorization": f"Bearer {other}"}, "PERMISSION_DENIED"),
        ):
            with pytest.raises(triton.InferenceServerException) as raised:
                client.infer("m", [x], headers=headers)
            assert raised.value.status() == f"StatusCode.{code}"
            with pytest.raises(triton.InferenceServerException):
                client.is_model_ready("m", headers=headers)
        found = client.infer("m", [x], headers={"authorization": f"Bearer {token}"})
        assert found.as_numpy("output").shape == (1, 2)

    speak(home, scene, access=(grant("me", token), grant("you", other, ["n"])))


def test_there_is_no_way_past_the_guard(home: Path) -> None:
    """Quick requests go past Serve; who has no token must not go past the guard with them."""
    token = "t" * 20
    x = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [0.0, 1.0, 2.0]}
    body = json.dumps({"inputs": [x]}).encode()

    async def scene() -> list[bool]:
        replica = Here.__new__(Here)
        settings = Service(access=(grant("me", token),))
        await SharedReplica.__init__(replica, ["m"], str(home), None, settings)
        replica.__serve_build_asgi_app__()
        lane = shortcut._lanes["/m/v2/models/m/infer"]
        mine = {b"authorization": f"Bearer {token}".encode()}
        part = replica._parts["m"]
        for _ in range(10_000):  # it has to be known as quick first
            if await lane(mine, body) is not None:
                break
            rows = pa.table({"x": [[0.0, 1.0, 2.0]]})
            await part._batcher.answer(part._follower.now.champion.run, rows)
        found = [await lane(h, body) is None for h in ({}, {b"authorization": b"Bearer no"}, mine)]
        await SharedReplica.__del__(replica)
        return found

    assert asyncio.run(scene()) == [True, True, False]


def test_a_port_that_is_taken_is_told(home: Path) -> None:
    async def scene() -> None:
        listener = Listener(None, "m")
        with pytest.raises(ServingError, match=r"'m' cannot be served by gRPC at nowhere\.invalid"):
            await listener.listen("nowhere.invalid:1")
        await listener.close()

    asyncio.run(scene())
    with pytest.raises(ValueError, match="grpc_port=70000 must be a port"):
        Service(grpc_port=70000)


def request(datatype: str, shape: list[int], **contents: Any) -> Any:
    tensor = {"name": "x", "datatype": datatype, "shape": shape}
    if contents:
        tensor["contents"] = MESSAGES["InferTensorContents"](**contents)
    return MESSAGES["ModelInferRequest"](model_name="m", inputs=[tensor])


@pytest.mark.parametrize(
    ("element", "datatype", "contents", "values"),
    [
        ("bool", "BOOL", {"bool_contents": [True, False]}, [True, False]),
        ("int8", "INT8", {"int_contents": [-1, 2]}, [-1, 2]),
        ("int64", "INT64", {"int64_contents": [-(2**60), 2]}, [-(2**60), 2]),
        ("uint8", "UINT8", {"uint_contents": [255, 0]}, [255, 0]),
        ("float", "FP32", {"fp32_contents": [0.5, 2]}, [0.5, 2.0]),
        ("double", "FP64", {"fp64_contents": [0.1, 2]}, [0.1, 2.0]),
        ("string", "BYTES", {"bytes_contents": ["ä".encode(), b""]}, ["ä", ""]),
    ],
)
def test_typed_contents_mean_what_raw_ones_do(
    element: str, datatype: str, contents: Any, values: Any
) -> None:
    body, length = body_of(request(datatype, [2], **contents), timeout_s=1.5)
    found = inquiry_of(body, [input_of("x", element, ())], ["y"], str(length))
    assert found.rows["x"].to_pylist() == values
    assert (found.raw, found.patience_s) == (True, 1.5)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (request("FP32", [1], fp64_contents=[1.0]), r"in \['fp64_contents'\], wanted fp32"),
        (request("FP16", [1], fp32_contents=[1.0]), "wanted raw_input_contents"),
        (request("INT8", [1], int_contents=[300]), "values are not INT8"),
    ],
)
def test_contents_of_another_type_are_refused(asked: Any, words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        body_of(asked)


def test_raw_contents_must_be_one_for_each_input() -> None:
    asked = request("FP32", [1])
    asked.raw_input_contents.extend([b"1234", b"1234"])
    with pytest.raises(BadRequest, match="2 raw_input_contents for 1 inputs"):
        body_of(asked)


def test_every_status_has_one_of_its_own() -> None:
    assert all(isinstance(code, grpc.StatusCode) for code in CODES.values())
    assert len(set(CODES.values())) == len(CODES)
