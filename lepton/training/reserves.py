"""Workers beside Ray Train's group: they join a run while it goes on, and leave it.

Ray Train's group keeps the size that it starts with, because changing it restarts every process.
What a run may have beyond that (``workers=(2, 8)`` on a cluster with room for three) are reserves:
actors of the same resources that wait until the cluster has room, which also tells the autoscaler
that they are wanted, and then take their seat like any other worker. One more, a spare, is started
where there is room for it now: it has imported everything and built its model when it is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
import ray.exceptions

from lepton.errors import TrainingError


class Reserve:
    """The actor: runs the loop on its own, as a worker of Ray Train's group does."""

    def run(self, config: dict[str, Any]) -> bool:
        """Train until the run ends, or this node goes away: then return True."""
        from lepton.training.ray_trainer import run_loop

        return run_loop(config, "reserve", stays=False)


class Reserves:
    """Keeps a number of reserves alive.

    Args:
        config: reference to what a worker is told.
        count: how many.
        each: resources of one.
        losses: how many may be lost before they are no longer replaced.
    """

    def __init__(self, config: Any, count: int, each: Mapping[str, float], losses: int) -> None:
        self._config = config
        self._count = count
        self._each = dict(each)
        self._left = losses
        self._running: dict[Any, Any] = {}

    def start(self) -> None:
        """Ask for all of them, once: not before Ray Train's group has got its place."""
        wanted, self._count = self._count, 0
        for _ in range(wanted):
            self._start()

    def _start(self) -> None:
        each = self._each
        rest = {k: v for k, v in each.items() if k not in ("CPU", "GPU")}
        actor: Any = (
            ray.remote(Reserve)
            .options(num_cpus=each.get("CPU", 0), num_gpus=each.get("GPU", 0), resources=rest)
            .remote()
        )
        self._running[actor.run.remote(self._config)] = actor

    def look_after(self) -> None:
        """Replace those that were lost, or whose nodes go away: elsewhere, when there is room.

        Raises:
            TrainingError: the loop raised on one of them.
        """
        if not self._running:
            return
        refs: list[Any] = list(self._running)
        over: list[Any] = ray.wait(refs, num_returns=len(refs), timeout=0)[0]
        for ref in over:
            actor = self._running.pop(ref)
            try:
                if ray.get(ref):
                    ray.kill(actor)
                    self._start()
            except ray.exceptions.RayActorError:
                if self._left > 0:
                    self._left -= 1
                    self._start()
            except ray.exceptions.RayTaskError as e:
                raise TrainingError(f"the training loop failed on a worker: {e.cause}") from e

    def end(self) -> None:
        """End all of them."""
        for actor in self._running.values():
            ray.kill(actor)
        self._running.clear()
