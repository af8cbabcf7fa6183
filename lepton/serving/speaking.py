"""A replica that speaks gRPC, too."""

from __future__ import annotations

from typing import Any

from lepton.serving.grpc_server import Listener
from lepton.serving.replica import Replica
from lepton.telemetry import Carrier


class SpeakingReplica(Replica):
    """One replica of one model's application, that is asked by HTTP and by gRPC.

    Args:
        model, home, trace: of the replica.
        grpc_address: host:port, the same for all replicas of a node.
    """

    async def __init__(
        self, model: str, home: str, trace: Carrier | None = None, grpc_address: str = ""
    ) -> None:
        Replica.__init__(self, model, home, trace)
        self._address = grpc_address
        self._listener = Listener(self.__serve_build_asgi_app__(), model)
        await self._listener.listen(grpc_address)

    async def follow(self) -> dict[str, Any]:
        """As any replica, and say where it listens."""
        return {**await Replica.follow(self), "grpc": self._address}

    async def __del__(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Serve awaits this. Let the calls under way end, then stop as any replica."""
        if hasattr(self, "_listener"):
            await self._listener.close()
        Replica.__del__(self)
