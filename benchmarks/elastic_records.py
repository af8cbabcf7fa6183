"""The workers' own records of the steps they made, read while they write them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

POLL_S = 0.1


@dataclass(frozen=True)
class Made:
    """A step that a process saw made."""

    step: int
    time_ns: int
    pid: int


class Records:
    """What all ranks of a run recorded; every look reads only what is new.

    Reading it all again at each look would take one of the two cores away from what is measured.

    Args:
        folder: where the ranks write, each a file ``*.steps`` of its own.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}
        self._made: list[Made] = []

    def all(self) -> list[Made]:
        """Return what there is, by time."""
        for path in self._folder.glob("*.steps"):
            with path.open("rb") as f:
                f.seek(self._read.get(path, 0))
                lines, _, rest = f.read().rpartition(b"\n")
                self._read[path] = f.tell() - len(rest)
            self._made += [Made(*map(int, line.split())) for line in lines.splitlines()]
        self._made.sort(key=lambda m: m.time_ns)
        return self._made

    def since(self, time_ns: int) -> list[Made]:
        """Return what was made from then on, and the last second before."""
        made = self.all()
        begin = len(made)
        while begin and made[begin - 1].time_ns > time_ns - 10**9:
            begin -= 1
        return made[begin:]

    def furthest(self, until_ns: int) -> int:
        """Return the newest step that was made by then; 0 if none was."""
        return max((m.step for m in self.all() if m.time_ns <= until_ns), default=0)

    def kill_all(self) -> None:
        """Kill every rank that is left: hung ones, and those that never made a step, too."""
        told = str(self._folder).encode()
        found = {m.pid for m in self.all()}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if told in path.read_bytes():
                    found.add(int(path.parent.name))
        for pid in found - {os.getpid()}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def wait_for(look: Callable[[], T | None], limit_s: float, process: Any) -> T | None:
    """Poll until there is something, as long as the process lives."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end and process.poll() is None:
        if (found := look()) is not None and found is not False:
            return found
        time.sleep(POLL_S)
    return None
