"""Clients that are slow, leave, or lie in wait, and parts of Ray Serve killed, under load."""

from __future__ import annotations

import socket
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import ray

from lepton.errors import ServingError
from tests.cluster.world import Load, World, request, wait_until

pytestmark = pytest.mark.usefixtures("ray_cluster")

SLOW, LEAVING = 200, 1000


def message(world: World) -> bytes:
    """A whole request, as it goes over the wire."""
    where, body = urlsplit(world.app.infer_url), request(world)
    head = f"POST {where.path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def connected(world: World) -> socket.socket:
    where = urlsplit(world.app.infer_url)
    return socket.create_connection((where.hostname or "", where.port or 0), timeout=120)


def test_two_hundred_slow_clients_hold_nobody_up(world: World) -> None:
    whole = message(world)
    with ExitStack() as stack, Load(world) as load:
        slow = [stack.enter_context(connected(world)) for _ in range(SLOW)]
        for at in range(12):  # a byte each, and then nothing while others are answered
            for one in slow:
                one.sendall(whole[at : at + 1])
            load.more(5)
        load.more(100)
        for one in slow:
            one.sendall(whole[12:])
        answers = [one.recv(2**16) for one in slow]

    assert load.failed == []
    assert {answer[:12] for answer in answers} == {b"HTTP/1.1 200"}


def kept(world: World) -> dict[int, tuple[int, int]]:
    """Open files of each replica, and its own memory in bytes."""
    found: dict[int, tuple[int, int]] = {}
    for pid in (r["pid"] for r in world.app.replicas()):
        told = Path(f"/proc/{pid}/status").read_text().splitlines()
        own = next(int(line.split()[1]) for line in told if line.startswith("RssAnon"))
        found[pid] = len(list(Path(f"/proc/{pid}/fd").iterdir())), own * 1024
    return found


def leave_often(world: World, part: bytes) -> None:
    for _ in range(LEAVING):
        with connected(world) as one:
            one.sendall(part)


def test_clients_who_leave_leave_nothing_behind(world: World) -> None:
    """In mid-request, and after it without having heard the answer."""
    whole = message(world)
    leave_often(world, whole)
    world.app.flush()
    before = kept(world)
    with Load(world) as load:
        for part in (whole[:-5], whole[:20], whole):
            leave_often(world, part)
        load.more(20)
    world.app.flush()
    after = kept(world)
    health = httpx.get(f"{world.app.url}/v2/health/ready", timeout=120).json()
    both = [(before[pid], after[pid]) for pid in before.keys() & after.keys()]

    assert load.failed == []
    assert (health["state"], health["waiting_rows"]) == ("ready", 0)
    assert both
    for (files, memory), (files_now, memory_now) in both:
        assert files_now < files + LEAVING / 2  # HAProxy keeps some connections for the next ones
        assert memory_now < memory + 64 * 2**20


def test_requests_are_answered_while_the_controller_is_dead(world: World) -> None:
    controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")

    def is_back() -> bool:
        with suppress(ServingError):
            return bool(world.app.replicas())
        return False

    with Load(world) as load:
        load.more(10)
        ray.kill(controller, no_restart=False)
        load.more(50)
        wait_until(is_back)
        load.more(50)

    assert load.failed == []
