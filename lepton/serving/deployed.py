"""A replica as it is deployed: guarded, and speaking gRPC too, where that is asked for."""

from __future__ import annotations

from typing import Any

from lepton.serving.access import Access, guarded
from lepton.serving.generation import Generation
from lepton.serving.grpc_server import Listener
from lepton.serving.replica import Replica
from lepton.serving.service import Service
from lepton.serving.shortcut import Reply
from lepton.telemetry import Carrier


class DeployedReplica(Replica):
    """One replica of one model's application.

    Args:
        model, home, trace: of the replica.
        service: the application's settings; the gRPC port is one port, on all nodes.
    """

    async def __init__(
        self,
        model: str,
        home: str,
        trace: Carrier | None = None,
        service: Service | None = None,
    ) -> None:
        settings = service or Service()
        self._access = Access(settings.access, model) if settings.access else None
        self._grpc = f"127.0.0.1:{settings.grpc_port}" if settings.grpc_port else ""
        Replica.__init__(self, model, home, trace)
        if self._grpc:
            self._listener = Listener(self.__serve_build_asgi_app__(), model)
            await self._listener.listen(self._grpc)

    def __serve_build_asgi_app__(self) -> Any:
        generation = Generation(
            self._model,
            self._chosen,
            batcher=self._batcher,
            answers=self._answers,
            spans=self._spans,
            directory=self._directory,
        )
        app = generation.before(Replica.__serve_build_asgi_app__(self))
        return guarded(app, self._access) if self._access else app

    def at_once(self, headers: dict[bytes, bytes], body: bytes) -> Reply | None:
        """As any replica, to those who may ask; others are refused where it is told why."""
        if self._access and self._access.refusal(headers.get(b"authorization")):
            return None
        return Replica.at_once(self, headers, body)

    async def follow(self) -> dict[str, Any]:
        """As any replica, and say where gRPC is spoken."""
        return {**await Replica.follow(self), "grpc": self._grpc}

    async def __del__(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Serve awaits this. Let the calls under way end, then stop as any replica."""
        if hasattr(self, "_listener"):
            await self._listener.close()
        Replica.__del__(self)
