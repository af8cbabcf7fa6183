"""The way past Ray Serve's bookkeeping, in front of a real uvicorn."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from lepton.serving import shortcut
from lepton.serving.scaling import Busy, wanted, wanted_s
from lepton.serving.shortcut import Shortcut, open_lane
from tests.unit.served import listening


async def behind(scope: Any, receive: Any, send: Any) -> None:
    """The application behind the shortcut: says what reached it."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    content = json.dumps({"path": scope["path"], "bytes": len(body)}).encode()
    headers = [(b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with listening(Shortcut(behind)) as url:
        yield int(url.rsplit(":", 1)[1])


def ask(port: int, pieces: list[bytes], path: str = "/quick") -> tuple[bytes, bytes]:
    """Send a body in pieces; return the head and the body of the answer."""
    size = sum(map(len, pieces))
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {size}\r\nconnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=120) as s:
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in (head.encode(), *pieces):
            s.sendall(piece)
            time.sleep(0.02)  # so that it arrives as a piece
        answer = b""
        while part := s.recv(65536):
            answer += part
    return tuple(answer.split(b"\r\n\r\n", 1))  # type: ignore[return-value]


async def lane(headers: dict[bytes, bytes], body: bytes) -> Any:
    if body.startswith(b"slow"):
        return None
    if body.startswith(b"broken"):
        raise RuntimeError("oh")
    return [(b"content-length", str(len(body)).encode()), (b"x-host", headers[b"host"])], body


@pytest.fixture(autouse=True)
def opened() -> Iterator[None]:
    close = open_lane("/quick", lane)
    yield
    close()


def test_a_lane_answers_what_it_can(port: int) -> None:
    head, body = ask(port, [b"ab", b"c" * 100_000, b"d"])
    assert head.startswith(b"HTTP/1.1 200")
    assert b"x-host: x" in head
    assert body == b"ab" + b"c" * 100_000 + b"d"


def test_what_it_leaves_goes_on_whole(port: int) -> None:
    _, body = ask(port, [b"slow", b"c" * 100_000])
    assert json.loads(body) == {"path": "/quick", "bytes": 100_004}
    assert json.loads(ask(port, [b"abc"], "/other")[1]) == {"path": "/other", "bytes": 3}
    assert json.loads(ask(port, [b"broken"])[1]) == {"path": "/quick", "bytes": 6}


def test_a_body_too_large_goes_on_whole(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortcut, "MAX_BYTES", 1000)
    _, body = ask(port, [b"a" * 600, b"b" * 600, b"c" * 600, b"d" * 600])
    assert json.loads(body) == {"path": "/quick", "bytes": 2400}


def test_a_closed_lane_is_not_asked(port: int) -> None:
    open_lane("/quick", lane)()
    assert json.loads(ask(port, [b"abc"])[1]) == {"path": "/quick", "bytes": 3}


class Transport:
    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)


class RequestResponseCycle:
    def __init__(self) -> None:
        self.transport: Any = Transport()

    async def send(self, message: Any) -> None:
        self.transport.write(message.get("body", b"head"))


async def in_parts(scope: Any, receive: Any, send: Any) -> None:
    """Answers piece by piece."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for body in (b"1", b"2", b"3"):
        await send({"type": "http.response.body", "body": body})


@pytest.mark.parametrize(
    ("path", "written"), [("/quick", [b"headabc"]), ("/slow", [b"head1", b"2", b"3"])]
)
def test_an_answer_is_written_in_one_piece(path: str, written: list[bytes]) -> None:
    async def receive() -> Any:
        return {"type": "http.request", "body": b"abc"}

    cycle = RequestResponseCycle()
    whole = cycle.transport
    scope = {"path": path, "method": "POST", "headers": [(b"host", b"x")]}
    asyncio.run(Shortcut(in_parts)(scope, receive, cycle.send))
    assert whole.written == written


def test_nothing_goes_out_before_there_is_a_body_to_it() -> None:
    """So that a replica that is killed meanwhile has answered nothing, and another one may."""
    begun, go = threading.Event(), threading.Event()

    async def held(scope: Any, receive: Any, send: Any) -> None:
        content = (await receive())["body"]
        headers = [(b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        begun.set()
        while not go.is_set():
            await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": content})

    head = b"POST /v2 HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\nexpect: 100-continue\r\n\r\n"
    with (
        listening(Shortcut(held)) as url,
        socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=60) as client,
    ):
        client.sendall(head)
        assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"abc")
        assert begun.wait(60)
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1000)
        go.set()
        client.settimeout(60)
        answer = client.recv(1000)
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert answer.endswith(b"\r\n\r\nabc")


@pytest.mark.parametrize(
    ("ongoing", "busy", "answered", "wished", "replicas"),
    [
        (0, [0.01], 0, 0, 0),
        (0, [0.01], 3, 0, 1),
        (4, [0.2], 0, 0, 1),
        (5, [0.2], 0, 0, 2),
        (1, [0.9], 9, 0, 2),
        (1, [0.45, 0.45], 9, 0, 2),
        (0, [0.9, 0.9, 0.9], 9, 0, 4),
        (0, [0.01], 3, 2, 2),
        (0, [0.9, 0.9, 0.9], 9, 2, 4),
    ],
)
def test_replicas_for_a_demand(
    ongoing: float, busy: list[float], answered: int, wished: int, replicas: int
) -> None:
    assert wanted(ongoing, busy, answered, target=4, wished=wished) == replicas


def test_how_busy_a_thread_is() -> None:
    clock, thread = iter([10.0, 14.0, 18.0, 18.0]), iter([1.0, 2.0, 9.0, 9.0])
    busy = Busy(lambda: next(clock), lambda: next(thread))
    assert [busy.share(), busy.share(), busy.share()] == [0.25, 1.0, 0.0]


def test_a_threads_own_time_is_counted() -> None:
    before, own = wanted_s(), time.thread_time()
    while time.thread_time() < own + 0.02:
        pass
    assert wanted_s() > before
