"""A replica that is away: what is under way is answered, others go elsewhere or wait."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from lepton.ingress import ELSEWHERE, settings_of
from lepton.serving.absence import Absence, can_be_sent_again, sends_elsewhere


class Asked:
    """An application that answers once it may."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.came = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.came += 1
        if scope["method"] == "POST":
            await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def client(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here")


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0)


@pytest.mark.parametrize("elsewhere", [True, False])
def test_who_is_away_answers_what_is_under_way_and_nobody_new(elsewhere: bool) -> None:
    async def scene() -> list[int]:
        absence, asked = Absence(elsewhere=elsewhere), Asked()
        async with client(absence.before(asked)) as http:
            first = asyncio.create_task(http.post("/"))
            await until(lambda: asked.came == 1)
            leaving = asyncio.create_task(absence.leave())
            await until(lambda: absence.away)
            second = asyncio.create_task(http.post("/"))
            health = await http.get("/")
            assert (health.status_code, leaving.done(), asked.came) == (200, False, 2)
            asked.go.set()
            await leaving
            came = asked.came
            absence.come_back()
            third = await http.post("/")
            assert came == 2
            return [(await first).status_code, (await second).status_code, third.status_code]

    assert asyncio.run(scene()) == [200, ELSEWHERE if elsewhere else 200, 200]


@pytest.mark.parametrize(
    ("scheme", "length", "again"),
    [
        ("http", b"0", True),
        ("http", b"30000", True),
        ("http", b"40000", False),
        ("http", None, False),
        ("http", b"x", False),
        ("http", b"1" * 5000, False),
        ("grpc", b"10", False),
    ],
)
def test_the_ingress_is_asked_to_send_again_what_it_can(
    scheme: str, length: bytes | None, again: bool
) -> None:
    headers = [(b"host", b"x")] + ([(b"content-length", length)] if length is not None else [])
    assert can_be_sent_again({"scheme": scheme, "headers": headers}) is again


def test_requests_that_do_not_end_are_waited_for_only_so_long() -> None:
    async def scene() -> None:
        absence, asked = Absence(), Asked()
        async with client(absence.before(asked)) as http:
            first = asyncio.create_task(http.post("/"))
            await until(lambda: asked.came == 1)
            with pytest.raises(TimeoutError):
                await absence.leave(0.01)
            absence.come_back()
            asked.go.set()
            assert (await first).status_code == 200

    asyncio.run(scene())


def test_the_ingress_that_lepton_starts_asks_another_replica() -> None:
    assert sends_elsewhere(settings_of("/tmp/x", range(4), 1, "haproxy"))
    assert not sends_elsewhere({})
