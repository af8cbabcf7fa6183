"""The rendezvous as a Ray actor, which also watches for hung workers and draining nodes."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from typing import Any

import ray
from ray._private.state import state as cluster_state  # Ray Train watches drains by it, too
from ray.util import get_node_ip_address
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lepton.training.membership import Membership
from lepton.training.rendezvous import Rendezvous
from lepton.training.seat import Invitation

DRAIN_POLL_S = 0.25


class Meeting:
    """Holds a run's rendezvous on the driver's node."""

    def __init__(self, membership: Membership, token: str, hang_s: float) -> None:
        self._rendezvous = Rendezvous(
            membership=membership, token=token, hung=self._end, hang_s=hang_s
        )
        self._node = ray.get_runtime_context().get_node_id()
        self._token = token
        self._drains: asyncio.Task[None] | None = None

    async def open(self) -> Invitation:
        """Begin to listen; return where."""
        port = await self._rendezvous.open()
        self._drains = asyncio.create_task(self._watch_drains())
        host: Any = get_node_ip_address
        return Invitation(host=str(host()), port=port, token=self._token)

    async def status(self) -> dict[str, Any]:
        """Return what :meth:`Rendezvous.status` does."""
        return self._rendezvous.status()

    async def _end(self, pid: int, host: str, node: str) -> None:
        """Kill a worker that fell silent, on whichever node it is."""
        if node == self._node:
            kill(pid)
            return
        there = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        remote: Any = ray.remote(num_cpus=0, max_retries=0)(kill)
        remote.options(scheduling_strategy=there).remote(pid)

    async def _watch_drains(self) -> None:
        while True:
            await asyncio.sleep(DRAIN_POLL_S)
            with suppress(Exception):  # the next poll asks again
                draining = await asyncio.to_thread(cluster_state.get_draining_nodes)
                if draining:
                    await self._rendezvous.release_nodes(set(draining))


def kill(pid: int) -> None:
    """End a process at once."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
