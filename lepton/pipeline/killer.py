"""Kills one training worker with SIGKILL in mid-epoch: the demo's proof, not a simulation."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lepton.training.progress import newest_step
from lepton.training.steps import attempts_of

LOOK_S = 0.01


@dataclass
class Kill:
    """What was killed: rank, process id, and the step that rank 0 had made last."""

    rank: int = -1
    pid: int = 0
    step: int = 0


@contextmanager
def kill_one_worker(folder: Path, *, after_step: int, rank: int = 1) -> Generator[Kill]:
    """While the block runs, kill a worker once, as soon as ``after_step`` steps were made.

    Works for workers on this machine.
    """
    done = Kill()
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(LOOK_S):
            newest = newest_step(folder)
            if newest is None or newest[0] < after_step:
                continue
            pids = attempts_of(folder / "steps")[-1].pids
            if rank < len(pids):
                os.kill(pids[rank], signal.SIGKILL)
                done.rank, done.pid, done.step = rank, pids[rank], newest[0]
            return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join()
