"""A replica as it is deployed: guarded where that is asked for, and continuing sequences."""

from __future__ import annotations

import os
from typing import Any

from lepton.errors import ServingError
from lepton.serving.absence import sends_elsewhere
from lepton.serving.access import Access, guarded
from lepton.serving.devices import device_for
from lepton.serving.generation import Generation
from lepton.serving.replica import Replica
from lepton.serving.room import Room
from lepton.serving.service import Service
from lepton.serving.shortcut import Reply
from lepton.serving.tokens import FileAccess
from lepton.telemetry import Carrier


class DeployedReplica(Replica):
    """One replica of one model.

    Args:
        model, home, trace: of the replica.
        service: the application's settings.
    """

    def __init__(
        self,
        model: str,
        home: str,
        trace: Carrier | None = None,
        service: Service | None = None,
    ) -> None:
        settings = service or Service()
        self._access = access_for(settings, model)
        device = device_for(settings)
        room = Room(device=device, most=settings.weights_bytes)
        elsewhere = sends_elsewhere(os.environ)
        Replica.__init__(self, model, home, trace, settings.threads, room=room, elsewhere=elsewhere)

    def __serve_build_asgi_app__(self) -> Any:
        generation = Generation(
            self._model,
            self._chosen,
            batcher=self._batcher,
            answers=self._answers,
            spans=self._spans,
        )
        app = self._absence.before(generation.before(self._application()))
        return guarded(app, self._access) if self._access else app

    async def at_once(self, headers: dict[bytes, bytes], body: bytes) -> Reply | None:
        """As any replica, to those who may ask; others are refused where it is told why."""
        if self._access and self._access.refusal(headers.get(b"authorization")):
            return None
        return await Replica.at_once(self, headers, body)


def access_for(settings: Service, model: str) -> Access | None:
    """Return what checks who asks, or None where everybody may.

    Raises:
        ServingError: the file of tokens is wrong.
    """
    if settings.tokens_file is not None:
        try:
            return FileAccess(settings.tokens_file, model)
        except ValueError as e:
            raise ServingError(f"model {model!r} is not served: {e}") from e
    return Access(settings.access, model) if settings.access else None
