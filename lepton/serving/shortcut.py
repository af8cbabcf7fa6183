"""From the socket straight to a quick model.

Ray Serve wraps every request in bookkeeping that costs several times what a small net does. A
request that a replica can answer at once, as most are, goes past it: Serve lets an ASGI middleware
be put in front of its replicas (``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH``, see
:mod:`lepton.ingress`), and :class:`Shortcut` hands such requests to the replica of this process.
All others, and all of them where there is no replica (in Serve's own proxies), take Serve's way.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.middleware import Middleware

from lepton.serving.inputs import MAX_BYTES

log = logging.getLogger("lepton")

Reply = tuple[list[tuple[bytes, bytes]], bytes]
Lane = Callable[[dict[bytes, bytes], bytes], Awaitable[Reply | None]]
"""Answers a request's headers and body with headers and body, status 200; or not at all."""

_lanes: dict[str, Lane] = {}


def open_lane(path: str, lane: Lane) -> Callable[[], None]:
    """Offer the requests of a path to a lane; return what ends that."""
    _lanes[path] = lane
    return lambda: _lanes.pop(path, None) and None


def middlewares() -> list[Middleware]:
    """What Ray Serve puts in front of its HTTP servers."""
    return [Middleware(Shortcut)]


class Shortcut:
    """An ASGI application in front of another one."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer at once, or pass the request on as it came."""
        if scope.get("method") != "POST" or not _lanes:
            await self._app(scope, receive, send)
            return
        lane = _lanes.get(scope["path"])
        came: list[Any] = []
        body = await _body(receive, came)
        _in_one_piece(send)  # uvicorn has asked for the body by now, where it is to
        reply: Reply | None = None
        if lane is not None and body is not None:
            try:
                reply = await lane(dict(scope["headers"]), body)
            except Exception:
                log.exception("a request could not be answered at once; it takes the other way")
        if reply is None:
            await self._app(scope, _again(came, receive), send)
            return
        headers, content = reply
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})


async def _body(receive: Callable[[], Awaitable[Any]], came: list[Any]) -> bytes | None:
    """Read a body, or as much of it as shows that it is too large or cut off: then None."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        came.append(message)
        if message["type"] != "http.request" or size > MAX_BYTES:
            return None
        part = message.get("body", b"")
        if not message.get("more_body", False):
            return b"".join((*parts, part)) if parts else part
        parts.append(part)
        size += len(part)


def _again(came: list[Any], receive: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
    """Give out what was received already, then what comes."""
    waiting = iter(came)

    async def received() -> Any:
        for message in waiting:
            return message
        return await receive()

    return received


class _Whole:
    """A transport that keeps the first piece of an answer until the second one comes."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._head: bytes | None = None
        self.write = self._keep

    def _keep(self, data: bytes) -> None:
        if self._head is None:
            self._head = data
        else:
            self._transport.write(self._head + data)
            self.write = self._transport.write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def _in_one_piece(send: Any) -> None:
    """Have uvicorn write headers and body at once, or the first part of the body.

    It saves a system call, and a replica that is killed has then answered wholly or not at all,
    so that the ingress may send the request to another one. With any other server, or another
    uvicorn, answers go out in two pieces as before.
    """
    cycle: Any = getattr(send, "__self__", None)
    if type(cycle).__name__ == "RequestResponseCycle" and hasattr(cycle, "transport"):
        cycle.transport = _Whole(cycle.transport)
