"""A replica behind a real uvicorn: what goes over the wire, whatever clients send."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from lepton.serving.replica import Replica
from lepton.serving.shortcut import Shortcut
from tests.unit.served import URL, body, listening, register_model, slow

ENOUGH = 100
"""Requests after which a model is known to be quick, however busy the machine."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return register_model(tmp_path_factory.mktemp("home"), "m")


@pytest.fixture(scope="module")
def replica(home: Path) -> Iterator[Replica]:
    made = Replica("m", str(home))
    yield made
    made.__del__()


@pytest.fixture(scope="module")
def url(replica: Replica) -> Iterator[str]:
    app = replica.__serve_build_asgi_app__()

    async def mounted(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "root_path": "/m"}, receive, send)

    with listening(Shortcut(mounted)) as base:
        yield f"{base}/m{URL}"


def asked(url: str, content: bytes, headers: dict[str, Any] | None = None) -> list[httpx.Response]:
    """Ask so often that the last answers come at once; only such ones tell an id in a header."""
    with httpx.Client(timeout=60) as http:
        return [http.post(url, content=content, headers=headers) for _ in range(ENOUGH)]


def test_an_id_is_told_in_a_header(url: str) -> None:
    told = {r.headers.get("x-request-id") for r in asked(url, body(id="a b"))}
    assert told - {None} == {"a b"}
    told = {r.headers.get("x-request-id") for r in asked(url, body(id="b"), {"x-request-id": "c"})}
    assert told - {None} == {"c"}


@pytest.mark.parametrize("identity", ["a\nb", "a\r\nx-lepton-version: 9", "\0", "\x7f", "é", "雪"])
def test_an_id_that_no_header_can_hold_is_told_in_the_body_alone(url: str, identity: str) -> None:
    replies = asked(url, body(id=identity))
    assert {r.status_code for r in replies} == {200}
    assert {r.json()["id"] for r in replies} == {identity}
    assert {r.headers["x-lepton-version"] for r in replies} == {"1"}
    assert not any("x-request-id" in r.headers for r in replies)


def test_an_id_of_odd_bytes_in_a_header_is_not_told_again(url: str) -> None:
    replies = asked(url, body(id="b"), {"x-request-id": b"\xff\xfe"})
    assert {(r.status_code, r.json()["id"]) for r in replies} == {(200, "b")}
    assert not any("x-request-id" in r.headers for r in replies)


def test_versions_come_and_go_while_others_are_asked_for(replica: Replica) -> None:
    """Who looks for a version must not see the versions in memory change under it."""
    follower, stop = replica._follower, threading.Event()
    champion, registry = follower.now.champion, follower._registry
    entry = registry.version("m", 1)

    def come_and_go() -> None:
        while not stop.is_set():
            for number in range(100, 150):
                follower._version(number)
            follower._load(registry.state("m").pointer)

    request: Any = type("Request", (), {"path_params": {"version": "1"}, "headers": {}})()
    thread = threading.Thread(target=come_and_go)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(follower, "_warm", lambda _: champion)
        patched.setattr(registry, "version", lambda _, number: replace(entry, version=number))
        patched.setattr(registry, "history", lambda _: [])
        thread.start()
        try:
            for _ in range(20_000):
                assert replica._chosen(request)[0].version == 1
        finally:
            stop.set()
            thread.join(60)


def test_clients_who_come_while_too_much_waits_are_told_when_to_come_again(
    replica: Replica, url: str
) -> None:
    """By many clients at once; those who were let in are answered."""
    follower = replica._follower
    before = follower.now
    held: Any = slow(replica, 1.0)
    try:
        with ThreadPoolExecutor(20) as threads, httpx.Client(timeout=60) as http:
            asking = [threads.submit(http.post, url, content=body()) for _ in range(20)]
            end = time.monotonic() + 60
            while sum(a.done() for a in asking) < 17 and time.monotonic() < end:
                time.sleep(0.01)
            held.go.set()
            replies = [a.result(60) for a in asking]
    finally:
        held.go.set()
        follower.now = before
    refused = [r for r in replies if r.status_code == 503]
    assert [r.status_code for r in replies if r not in refused] == [200, 200, 200]
    assert {r.headers["retry-after"] for r in refused} == {"3"}
    assert {r.headers["content-type"] for r in refused} == {"application/problem+json"}
