"""A replica that is away for a while: it answers what is under way, then nobody asks it.

Who asks meanwhile is sent elsewhere by the ingress, where that tries another replica on
:data:`ELSEWHERE`; anybody else waits until the replica is back: gRPC, Serve's own proxy, and what
the ingress cannot send again, as it does not keep so much of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from lepton.ingress import BUFFER_BYTES, ELSEWHERE, RETRY_ON, SWITCH
from lepton.serving.forms import problem

DRAIN_S = 60.0


def sends_elsewhere(environment: Mapping[str, str]) -> bool:
    """Whether the ingress asks another replica where one answers :data:`ELSEWHERE`."""
    words = environment.get(RETRY_ON, "").split()
    return environment.get(SWITCH) == "1" and str(ELSEWHERE) in words


def can_be_sent_again(scope: Mapping[str, Any]) -> bool:
    """Whether a request came through the ingress, and its head and body fit into its buffer."""
    told = dict(scope["headers"]).get(b"content-length", b"")
    head = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    whole = told.isdigit() and len(told) < 12 and head + int(told) <= BUFFER_BYTES // 2
    return whole and scope.get("scheme") != "grpc"


class Absence:
    """Knows whether a replica is away. Of one event loop.

    Args:
        elsewhere: the ingress asks another replica.

    Attributes:
        away: it answers nobody new.
    """

    def __init__(self, *, elsewhere: bool = False) -> None:
        self.away = False
        self._elsewhere = elsewhere
        self._under_way = 0
        self._changed = asyncio.Event()

    def before(self, app: Any) -> Any:
        """Return an ASGI application that leaves requests to ``app`` unless the replica is away."""

        async def guarded(scope: Any, receive: Any, send: Any) -> None:
            if scope.get("method") != "POST":
                await app(scope, receive, send)
                return
            if self.away and self._elsewhere and can_be_sent_again(scope):
                detail = "this replica is taking up another version: ask another one"
                await problem(ELSEWHERE, detail)(scope, receive, send)
                return
            while self.away:
                await self._next()
            self._under_way += 1
            try:
                await app(scope, receive, send)
            finally:
                self._under_way -= 1
                self._tell()

        return guarded

    async def leave(self, patience_s: float = DRAIN_S) -> None:
        """Let nobody new in, and wait until all requests under way are answered.

        Raises:
            TimeoutError: they were not in time; it is away all the same.
        """
        self.away = True
        async with asyncio.timeout(patience_s):
            while self._under_way:
                await self._next()

    def come_back(self) -> None:
        """Let everybody in again."""
        self.away = False
        self._tell()

    async def _next(self) -> None:
        await self._changed.wait()

    def _tell(self) -> None:
        """Wake all who wait for a change."""
        self._changed.set()
        self._changed = asyncio.Event()
