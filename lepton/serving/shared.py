"""A replica of one or several models: each is a replica of its own, in one process and event loop.

What one of them is asked, promoted or refused is nothing to the others. (Serve's own multiplexing
was not taken: it loads a model when it is first asked for, and knows no promotion.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from lepton.registry.events import check_name
from lepton.serving.deployed import DeployedReplica
from lepton.serving.grpc_server import Listener
from lepton.serving.joint import joined
from lepton.serving.scaling import ANSWERED, BUSY, WISHED
from lepton.serving.service import Service
from lepton.serving.shortcut import open_lane
from lepton.telemetry import Carrier

JOINT = "+"
"""Between the names of models that are served together; none of them can have it."""


def models_of(given: str | Sequence[str]) -> tuple[str, ...]:
    """Return the models to serve together, checked.

    Raises:
        ValueError: there are none, one is named twice, or one cannot name a model.
    """
    models = (given,) if isinstance(given, str) else tuple(given)
    if not models or len(set(models)) != len(models):
        raise ValueError(f"models={given!r} must be one or several names, each once")
    for model in models:
        check_name(model)
    return models


class SharedReplica:
    """One replica of an application.

    Args:
        models: that it has.
        home, trace: of the replicas.
        service: the application's settings.
        most: replicas that it may have.
    """

    async def __init__(
        self,
        models: Sequence[str],
        home: str,
        trace: Carrier | None = None,
        service: Service | None = None,
        most: int = 1,
    ) -> None:
        settings = service or Service()
        here = ray.is_initialized()  # asking for the actor would start a Ray where there is none
        self._id = str(ray.get_runtime_context().get_actor_id()) if here else ""
        self._most = most
        self._wished = 0
        self._parts = {m: DeployedReplica(m, home, trace, settings) for m in models}
        self._ends: list[Any] = []
        self._reached = ""
        self._listener: Listener | None = None
        if settings.grpc_address:
            self._listener = Listener(self.__serve_build_asgi_app__(), JOINT.join(models))
            await self._listener.listen(settings.grpc_address)
            everywhere = settings.grpc_host in ("0.0.0.0", "::", "[::]")  # noqa: S104 - as asked
            host = ray.util.get_node_ip_address() if everywhere else settings.grpc_host
            self._reached = f"{host}:{settings.grpc_port}"

    def __serve_build_asgi_app__(self) -> Any:
        """Each model's own application, told by the path."""
        apps = {m: part.__serve_build_asgi_app__() for m, part in self._parts.items()}
        if len(apps) == 1:
            return next(iter(apps.values()))
        prefix = f"/{JOINT.join(apps)}"
        for model, part in self._parts.items():
            self._ends.append(open_lane(f"{prefix}/v2/models/{model}/infer", part.at_once))
        return joined(apps)

    async def follow(self, model: str) -> dict[str, Any]:
        """Take up a model's newest pointer; return what is served and what went wrong."""
        return self._told(await self._parts[model].follow())

    def _told(self, followed: dict[str, Any]) -> dict[str, Any]:
        return {**followed, "grpc": self._reached, "id": self._id, "most": self._most}

    async def replace(self, model: str, which: str) -> dict[str, Any]:
        """If it is this replica that is meant, take up a version that does not fit beside another.

        Args:
            model: whose version.
            which: the ``id`` of a replica, as :meth:`follow` tells it.
        """
        return self._told(await self._parts[model].replace()) if which == self._id else {}

    async def wish(self, _: str, replicas: int) -> None:
        """Have at least so many replicas, as far as the application's bounds allow; 0 ends that."""
        self._wished = replicas

    async def check_health(self) -> None:
        """Tell Serve, which calls this, to start a replica anew that can answer nobody.

        Raises:
            RuntimeError: this is one.
        """
        lost = sorted(model for model, part in self._parts.items() if part.lost)
        if lost:
            raise RuntimeError(f"neither the new nor the former version of {lost} can be loaded")

    async def flush(self, model: str) -> bool:
        """Commit a model's inference log and write its spans."""
        return await self._parts[model].flush()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Tell Ray Serve how busy this replica is; the event loop is the same for all models."""
        told = [await part.record_autoscaling_stats() for part in self._parts.values()]
        answered = sum(t[ANSWERED] for t in told)
        return {BUSY: told[0][BUSY], ANSWERED: answered, WISHED: self._wished}

    async def __del__(self) -> None:
        """Serve awaits this. Let the calls under way end, then stop."""
        listener = getattr(self, "_listener", None)  # it may never have come up
        if listener is not None:
            await listener.close()
        for end in getattr(self, "_ends", []):
            end()
        for part in getattr(self, "_parts", {}).values():
            part.__del__()
