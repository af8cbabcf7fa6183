"""Workers as plain processes around a rendezvous in this one: recovery without Ray in between.

They are forked from one process that has torch and lepton loaded already: to import them anew costs
each worker seconds of a core, and a run of the tests starts a hundred.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

import lepton
from lepton.lake import Snapshot
from lepton.telemetry import Carrier
from lepton.training.membership import Membership
from lepton.training.plan import Plan
from lepton.training.rendezvous import Rendezvous
from lepton.training.run import Run, next_attempt
from lepton.training.seat import Invitation
from lepton.training.trainer import _lineage, _write_run  # the parts of train() without Ray

TOKEN = "crew"
LOADED = ["pytest", "torch.distributed.fsdp", "torch.optim", "lepton.training.rounds", __name__]


def work(config: dict[str, Any]) -> None:
    """What each process runs."""
    import torch

    from lepton.training.rounds import Rounds
    from lepton.training.seat import Released, Seat
    from lepton.training.worker import Worker

    torch.set_num_threads(1)
    seat = Seat(config["invitation"], node=config["node"])
    stream = config["stream"]

    def open_shard(rank: int, world_size: int, cursor: Any, _: int) -> Any:
        return stream.shard(rank, world_size, cursor)

    rounds = Rounds(lambda: Worker(config["plan"], open_shard, seat))
    try:
        rounds.run(config["loop"])
    except Released:
        pass
    except Exception as e:
        seat.leave(f"rank {rounds.worker.rank}: {e}")
        raise
    finally:
        seat.close()


def write_rows(path: Path, rows: int, *, seed: int = 0, dtype: str = "float32") -> Snapshot:
    """Write a table of three numbers and of which is the largest."""
    x = np.random.default_rng(seed).normal(size=(rows, 3)).astype(dtype)
    return lepton.write(pa.table({"x": list(x), "y": x.argmax(1).astype("int64")}), path)


def plan_of(folder: Path, stream: Any, stop: Any = None, **options: Any) -> Plan:
    """Write what a run starts with, as ``lepton.train`` does; ``options`` are the plan's own."""
    carrier = Carrier("", str(folder.parent / "traces"))
    _write_run(folder, folder.name, stream, carrier, stop)
    plan: dict[str, Any] = {"checkpoint_every": 25, "audit": True, "preparation": None, "seed": 0}
    lineage = {**_lineage(stream), "run": folder.name}
    about = {"folder": str(folder), "lineage": lineage, "carrier": carrier, "session": "s"}
    return Plan(**{**plan, **about, "stop": stop, **options})


def run_of(folder: Path) -> Run:
    """The run of a folder."""
    return Run(name=folder.name, folder=str(folder))


class Crew:
    """Starts workers, kills them, and waits for the end."""

    unfinished: ClassVar[set[Crew]] = set()  # for the fixture that ends what a failed test left

    def __init__(
        self,
        loop: Callable[[Any], None],
        stream: Any,
        plan: Any,
        *,
        most: int,
        first: int,
        hang_s: float = 10.0,
        slow_s: float = 5.0,
    ) -> None:
        membership = Membership(
            fewest=1, most=most, expected=first, number=next_attempt(Path(plan.folder))
        )
        self.rendezvous = Rendezvous(
            membership=membership, token=TOKEN, hung=self._hung, hang_s=hang_s
        )
        self.rendezvous.stragglers.lasting_s = slow_s
        self._events = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._events.run_forever, daemon=True)
        self._thread.start()
        port = self._do(self.rendezvous.open("127.0.0.1"))
        invitation = Invitation(host="127.0.0.1", port=port, token=TOKEN)
        self._config = {"loop": loop, "stream": stream, "plan": plan, "invitation": invitation}
        self._folder = Path(plan.folder)
        self._fork = multiprocessing.get_context("forkserver")
        self._fork.set_forkserver_preload(LOADED)
        self.processes: list[Any] = []
        Crew.unfinished.add(self)
        for _ in range(first):
            self.add()

    def _do(self, what: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(what, self._events).result(30)

    async def _hung(self, pid: int, host: str, node: str) -> None:
        os.kill(pid, signal.SIGKILL)

    def add(self, node: str = "here") -> Any:
        """Start one more worker."""
        process = self._fork.Process(
            target=work, args=({**self._config, "node": node},), daemon=True
        )
        process.start()
        self.processes.append(process)
        return process

    def release(self, node: str) -> None:
        """Tell that a node goes away."""
        self._do(self.rendezvous.release_nodes({node}))

    def status(self) -> dict[str, Any]:
        """What the rendezvous knows."""

        async def ask() -> dict[str, Any]:
            return self.rendezvous.status()

        return self._do(ask())

    def wait_for(self, condition: Callable[[dict[str, Any]], bool], timeout_s: float = 240) -> Any:
        """Poll until the status fulfils a condition."""
        end = time.monotonic() + timeout_s
        while not condition(status := self.status()):
            assert time.monotonic() < end, status
            time.sleep(0.01)
        return status

    def pid_of_rank(self, rank: int) -> int:
        """Process id of a rank of the newest generation."""
        newest = sorted((self._folder / "steps").glob("[0-9]*.json"))[-1]
        return int(json.loads(newest.read_text())["pids"][rank])

    def join(self, timeout_s: float = 240) -> dict[str, Any]:
        """Wait for the end of the run and of every process."""
        try:
            return self.wait_for(lambda s: s["finished"] or bool(s["error"]), timeout_s)
        finally:
            for process in self.processes:
                process.join(10)
            self.close()

    def close(self) -> None:
        """End everything."""
        Crew.unfinished.discard(self)
        for process in self.processes:
            with suppress(ProcessLookupError, AttributeError):
                process.kill()
        self._do(self.rendezvous.close())
        self._events.call_soon_threadsafe(self._events.stop)
        self._thread.join()
        self._events.close()
