"""Streams from a real replica over ASGI: tokens as they come, and an end when the client leaves."""

from __future__ import annotations

import asyncio
import json
import queue
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch

import lepton
from lepton import cluster
from lepton.registry import Registry
from lepton.serving import Service, grant
from lepton.serving.grpc_streams import FINAL
from lepton.serving.sequences import LINES
from lepton.serving.shared import SharedReplica
from lepton.telemetry import entries_of, spans_of
from lepton.telemetry.conventions import strays
from tests.unit.served import slow

CLASSES, LENGTH = 7, 4
URL = "/v2/models/m/generate_stream"


class Counting(torch.nn.Module):
    """After token t it expects t + 1, round and round."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = torch.nn.Embedding(CLASSES, CLASSES)
        with torch.no_grad():
            self.scores.weight.copy_(torch.eye(CLASSES).roll(1, 1) * 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scores(x)


def loop(worker: Any) -> None:
    net = Counting()
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=1e-9))
    for batch in worker.batches():
        scores = net(batch["x"])
        worker.step(torch.nn.functional.cross_entropy(scores[:, -1], batch["y"], reduction="sum"))


def plain(worker: Any) -> None:
    net = torch.nn.Linear(2, 2)
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
    for batch in worker.batches():
        scores = net(batch["z"])
        worker.step(torch.nn.functional.cross_entropy(scores, batch["y"] % 2, reduction="sum"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    x = np.random.default_rng(0).integers(0, CLASSES, (40, LENGTH))
    z = np.zeros((40, 2), "float32")
    rows = pa.table({"x": list(x), "y": (x[:, -1] + 1) % CLASSES, "z": list(z)})
    table = lepton.write(rows, home / "t")
    registry = Registry(f"{home}/registry")
    for name, made in (("m", loop), ("plain", plain)):
        run = lepton.train(made, table.stream(batch_size=20), name=name, home=str(home))
        lepton.register(run, name, home=str(home))
        registry.promote(name, 1, expect=None)
    return home


class Here(SharedReplica):
    """Ended by the scene, as by Serve; not again when it is collected."""

    def __del__(self) -> None:  # type: ignore[override]
        pass


@asynccontextmanager
async def replica_of(home: Path, model: str = "m", **settings: Any) -> AsyncIterator[Any]:
    replica = Here.__new__(Here)
    await SharedReplica.__init__(replica, [model], str(home), None, Service(**settings))
    try:
        yield replica
    finally:
        await SharedReplica.__del__(replica)


def play(home: Path, scene: Callable[[httpx.AsyncClient], Any], **settings: Any) -> Any:
    async def whole() -> Any:
        async with replica_of(home, **settings) as replica:
            transport = httpx.ASGITransport(replica.__serve_build_asgi_app__())
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
                return await scene(http)

    return asyncio.run(whole())


def asked(*prompt: int, **parameters: Any) -> dict[str, Any]:
    return {"x": list(prompt), "id": "me", "parameters": parameters}


@pytest.mark.parametrize("url", [URL, URL.removesuffix("_stream")])
def test_a_client_may_tell_by_a_header_how_long_it_waits(home: Path, url: str) -> None:
    async def scene() -> None:
        async with replica_of(home) as replica:
            held: Any = slow(replica._parts["m"], 0.1)
            transport = httpx.ASGITransport(replica.__serve_build_asgi_app__())
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
                late, wrong = [
                    await http.post(url, json=asked(1), headers={"x-request-timeout-ms": told})
                    for told in ("20", "soon")
                ]
            held.go.set()
            assert (late.status_code, wrong.status_code) == (504, 400)

    asyncio.run(scene())


def test_tokens_come_as_events_as_lines_and_at_once(home: Path) -> None:
    trace = "c" * 32

    async def scene(http: httpx.AsyncClient) -> None:
        headers = {"traceparent": f"00-{trace}-{'d' * 16}-01"}
        events = await http.post(URL, json=asked(1, 2, max_tokens=6), headers=headers)
        assert events.headers["content-type"] == "text/event-stream"
        told = [json.loads(e.removeprefix("data: ")) for e in events.text.split("\n\n")[:-1]]
        assert told[:-1] == [
            {"id": "me", "index": i, "token": t} for i, t in enumerate([3, 4, 5, 6, 0, 1])
        ]
        assert told[-1]["finish_reason"] == "length"
        assert told[-1]["traceparent"][3:35] == trace
        lines = await http.post(URL, json=asked(1, 2, stop=5), headers={"accept": f"{LINES}, */*"})
        told = [json.loads(line) for line in lines.text.splitlines()]
        assert [t.get("token") for t in told] == [3, 4, None]
        assert (told[-1]["tokens"], told[-1]["finish_reason"]) == ([3, 4], "stop")
        whole = await http.post("/v2/models/m/versions/1/generate", json=asked(6, max_tokens=2))
        assert (whole.json()["tokens"], whole.json()["model_version"]) == ([0, 1], "1")
        none = await http.post(URL, json=asked(1, stop=2))
        assert none.status_code == 200
        assert '"tokens":[]' in none.text

    play(home, scene)
    (span,) = spans_of(str(home / "traces"), trace)
    assert (span.name, span.attributes["lepton.rows"]) == ("lepton.request", 6)
    log = lepton.table(home / "answers" / "m").to_arrow().to_pandas()
    assert [0, 1] in [list(t) for t in log["answer_tokens"] if t is not None]


def test_an_answer_names_itself_from_its_beginning(home: Path) -> None:
    trace = "e" * 32

    async def scene(http: httpx.AsyncClient) -> None:
        headers = {"traceparent": f"00-{trace}-{'d' * 16}-01", "baggage": "team=core"}
        for url in (URL, "/v2/models/m/generate"):
            reply = await http.post(url, json=asked(1, max_tokens=2), headers=headers)
            last = reply.text.split("data: ")[-1]
            assert reply.headers["traceparent"] == json.loads(last)["traceparent"]
            assert entries_of(reply.headers["baggage"]).items() >= {
                ("team", "core"),
                ("lepton.version", "1"),
            }
        wrong = await http.post(URL, json={"x": []}, headers=headers)
        assert wrong.headers["traceparent"][3:35] == trace
        assert wrong.headers["x-lepton-version"] == "1"

    play(home, scene)
    spans = spans_of(str(home / "traces"), trace)
    assert [s.attributes["http.response.status_code"] for s in spans] == [200, 200, 400]
    assert [s.attributes.get("error.type") for s in spans] == [None, None, "BadRequest"]
    assert {s.status for s in spans} == {"ok"}
    assert {s.attributes["http.route"] for s in spans} == {URL, "/v2/models/m/generate"}
    assert [a for s in spans for a in strays(s.name, s.attributes)] == []


def test_a_slow_stream_is_kept_though_nobody_sampled_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(http: httpx.AsyncClient) -> None:
        for digit, url in (("1", URL), ("2", URL), ("3", "/v2/models/m/generate")):
            if digit == "2":
                monkeypatch.setattr("lepton.serving.generation.SLOW_NS", 0)
            headers = {"traceparent": f"00-{digit * 32}-{'d' * 16}-00"}
            await http.post(url, json=asked(1, max_tokens=2), headers=headers)

    monkeypatch.setattr("lepton.serving.generation.SLOW_NS", 3600 * 10**9)
    play(home, scene)
    kept = [len(spans_of(str(home / "traces"), digit * 32)) for digit in "123"]
    assert kept == [0, 1, 1]


@pytest.mark.parametrize(
    ("model", "path", "content", "status", "words"),
    [
        ("m", URL, {"x": []}, 400, "list of 1 to"),
        ("m", "/v2/models/m/versions/9/generate", {"x": [1]}, 404, "version 9"),
        ("m", "/v2/models/n/generate", {"x": [1]}, 404, "there is no POST"),
        ("plain", "/v2/models/plain/generate", {"z": [1]}, 400, "gives no sequences"),
    ],
)
def test_what_cannot_be_begun_has_its_status(
    home: Path, model: str, path: str, content: Any, status: int, words: str
) -> None:
    async def whole() -> None:
        async with replica_of(home, model) as replica:
            transport = httpx.ASGITransport(replica.__serve_build_asgi_app__())
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
                reply = await http.post(path, json=content)
            assert reply.status_code == status
            assert words in reply.json()["detail"]

    asyncio.run(whole())


def test_streams_need_a_token_too(home: Path) -> None:
    async def scene(http: httpx.AsyncClient) -> None:
        assert (await http.post(URL, json=asked(1))).status_code == 401
        mine = {"authorization": f"Bearer {'t' * 20}"}
        assert (await http.post(URL, json=asked(1), headers=mine)).status_code == 200

    play(home, scene, access=(grant("me", "t" * 20),))


class Client:
    """Speaks ASGI by hand, so that it can leave after some tokens."""

    def __init__(self, leaves_after: int) -> None:
        self.events: list[bytes] = []
        self.status = 0
        self._leaves_after = leaves_after
        self._left = asyncio.Event()
        self._asked = False

    async def receive(self) -> Any:
        if not self._asked:
            self._asked = True
            body = json.dumps(asked(1, max_tokens=1000)).encode()
            return {"type": "http.request", "body": body}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        self.events.append(message["body"])
        if len(self.events) == self._leaves_after:
            self._left.set()


def stream_scope(trace: str) -> dict[str, Any]:
    return {
        "type": "http",
        "method": "POST",
        "path": f"/m{URL}",
        "root_path": "/m",
        "query_string": b"",
        "headers": [(b"traceparent", f"00-{trace}-{'e' * 16}-01".encode())],
    }


def test_nobody_works_for_a_client_who_has_left(home: Path) -> None:
    trace = "f" * 32

    async def whole() -> int:
        async with replica_of(home) as replica:
            client = Client(leaves_after=5)
            app = replica.__serve_build_asgi_app__()
            await app(stream_scope(trace), client.receive, client.send)
            assert client.status == 200
            assert replica._parts["m"]._batcher.waiting_rows == 0
            return len(client.events)

    assert 5 <= asyncio.run(whole()) <= 7
    (span,) = spans_of(str(home / "traces"), trace)
    assert span.attributes["http.response.status_code"] == 499


def test_a_stream_that_is_cancelled_is_recorded(home: Path) -> None:
    trace = "9" * 32

    async def whole() -> None:
        async with replica_of(home) as replica:
            client = Client(leaves_after=10**6)
            app = replica.__serve_build_asgi_app__()
            task = asyncio.create_task(app(stream_scope(trace), client.receive, client.send))
            while not client.events:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(whole())
    (span,) = spans_of(str(home / "traces"), trace)
    assert span.attributes["http.response.status_code"] == 499


def test_what_goes_wrong_on_the_way_is_the_last_event(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def whole() -> None:
        async with replica_of(home) as replica:
            answer, runs = replica._parts["m"]._batcher.answer, 0

            async def twice(*arguments: Any) -> Any:
                nonlocal runs
                runs += 1
                if runs == 3:
                    raise TimeoutError
                return await answer(*arguments)

            monkeypatch.setattr(replica._parts["m"]._batcher, "answer", twice)
            client = Client(leaves_after=10**6)
            app = replica.__serve_build_asgi_app__()
            await app(stream_scope("8" * 32), client.receive, client.send)
            assert len(client.events) == 3
            assert client.events[-1].startswith(b"event: error\ndata:")
            assert json.loads(client.events[-1].split(b"data: ")[1])["status"] == 504

    asyncio.run(whole())


def test_tokens_come_over_a_grpc_stream_too(home: Path) -> None:
    triton = pytest.importorskip("tritonclient.grpc")
    port = cluster.free_ports(1)[0]

    def speak() -> list[Any]:
        client, came = triton.InferenceServerClient(f"127.0.0.1:{port}"), queue.Queue[Any]()
        client.start_stream(lambda result, error: came.put(error or result))
        for tokens, parameters in (
            ([[2, 3]], {"max_tokens": 3}),
            ([[2, 3]], {"max_tokens": 0}),
            ([[6]], {"max_tokens": 5, "stop": 2}),
        ):
            sent = triton.InferInput("x", [1, len(tokens[0])], "INT64")
            sent.set_data_from_numpy(np.array(tokens, "int64"))
            client.async_stream_infer("m", [sent], request_id="me", parameters=parameters)
        found: list[Any] = [came.get(timeout=60) for _ in range(4 + 1 + 3)]
        client.stop_stream()
        client.close()
        return found

    async def scene() -> list[Any]:
        async with replica_of(home, grpc_port=port):
            return await asyncio.to_thread(speak)

    found = asyncio.run(scene())
    wrong = found.pop(4)
    assert "'max_tokens' must be a whole number from 1" in wrong.message()
    ends = [i for i, f in enumerate(found) if f.get_response().parameters[FINAL].bool_param]
    assert ends == [3, 6]
    tokens = [int(f.as_numpy("token")[0]) for i, f in enumerate(found) if i not in ends]
    assert tokens == [4, 5, 6, 0, 1]
    reasons = [found[i].get_response().parameters["finish_reason"].string_param for i in ends]
    assert reasons == ["length", "stop"]
    assert {f.get_response().id for f in found} == {"me"}
