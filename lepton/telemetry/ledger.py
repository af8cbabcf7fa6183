"""How many spans a process has recorded and how many a collector took, readable after a SIGKILL.

Beside its span file a process has a small file mapped into memory: what it writes there costs some
60 ns and is the kernel's at once, so a kill loses none of it. A span counts when it begins (in a
bulk: when it ends). What counts there and has no line in the span file is lost, if the process is
gone.
"""

from __future__ import annotations

import mmap
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import count
from pathlib import Path

import orjson

from lepton.telemetry.rounds import rounds

SENT, SPANS, FIRST, GONE, SLOTS = 0, 1, 2, 63, 64
SIZE = 4096
"""Bytes of the file: 64 counters of 8 bytes, then JSON up to a zero byte."""
_ABOUT = 8 * SLOTS
BEAT_S, SILENT_S = 10.0, 60.0
"""So often a process touches its ledger; so long without that, it is gone. Clocks may differ."""


class Ledger:
    """This process's file of counters in a directory of span files.

    Args:
        directory: where span files are.
        process: what it is called there.
    """

    def __init__(self, directory: str, process: str) -> None:
        self._about: dict[str, object] = {
            "process": process,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "began": began_at(os.getpid()),
            "trace_id": "",
        }
        _leave_to_the_dead(directory)
        self._adding = threading.Lock()
        self._slots = count(FIRST)
        try:
            self._memory: mmap.mmap | bytearray = _mapped(directory)
        except OSError:  # a file system without it: the counters are nobody's
            self._memory = bytearray(SIZE)
        self._counters = memoryview(self._memory)[:_ABOUT].cast("Q")
        self._describe()
        self._path, self._beaten = file_of(directory, "count"), time.monotonic()
        with suppress(RuntimeError):  # no thread begins any more where a process ends
            rounds.join(self._beat)

    def _beat(self, last: bool) -> None:
        """Tell other machines that this process runs: what is mapped may reach them late."""
        if not last and time.monotonic() - self._beaten >= BEAT_S:
            self._beaten = time.monotonic()
            with suppress(OSError):
                os.utime(self._path)

    def begin(self, trace_id: str) -> None:
        """Count a span that begins; the first one's trace is this process's."""
        if not self._about["trace_id"]:
            self._about["trace_id"] = trace_id
            self._describe()
        with self._adding:
            self._counters[SPANS] += 1

    def took(self, spans: int) -> None:
        """Count spans that a collector took."""
        with self._adding:
            self._counters[SENT] += spans

    def missed(self, spans: int) -> None:
        """Count spans that were to be recorded, and were not."""
        with self._adding:
            self._counters[SPANS] += spans

    def let_go(self, spans: int) -> None:
        """Count spans that were deleted to make room."""
        with self._adding:
            self._counters[GONE] += spans

    def forget_sent(self) -> None:
        """Say no more about what a collector took."""
        with self._adding:
            self._counters[SENT] = 0

    def row(self) -> tuple[memoryview, int, Iterator[int]]:
        """Return what counts spans without a lock or a call, for one that ends many.

        Each is ``counters[slot] = next(numbers)``.
        """
        slot = min(next(self._slots), GONE - 1)
        return self._counters, slot, count(self._counters[slot] + 1)

    def _describe(self) -> None:
        about = orjson.dumps(self._about)[: SIZE - _ABOUT - 1] + b"\0"
        self._memory[_ABOUT : _ABOUT + len(about)] = about


@lru_cache(maxsize=16)
def ledger_of(pid: int, directory: str, process: str) -> Ledger:
    """Return this process's ledger in a directory."""
    made = Ledger(directory, process)
    _made.append(made)
    return made


_made: list[Ledger] = []


def began_at(pid: int) -> int:
    """Return when a process of this machine began, in ticks since it was switched on; 0: unknown.

    With its id that tells it from all others: ids come again, in a container at once.
    """
    with suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return 0


def _leave_to_the_dead(directory: str) -> None:
    """Put away the files of a process that had this one's id, so that each has its own losses."""
    told = read(file_of(directory, "count"))
    before = told[0].get("began", 0) if told else 0
    if not before or before == began_at(os.getpid()):
        return
    for kind in ("1.jsonl", "jsonl", "count"):
        path = file_of(directory, kind)
        with suppress(OSError):
            path.rename(path.with_name(path.name.removesuffix(kind)[:-1] + f"-{before}.{kind}"))


def took(spans: int) -> None:
    """Count spans that a collector took; with several directories, nobody knows which had them."""
    for one in _made:
        if len(_made) == 1:
            one.took(spans)
        else:
            one.forget_sent()


def file_of(directory: str, kind: str) -> Path:
    """Return the path of this process's file: ``jsonl`` or ``count``."""
    return Path(directory) / f"{socket.gethostname()}-{os.getpid()}.{kind}"


def has_beaten(path: Path) -> bool:
    """Whether a ledger of another machine was touched lately."""
    with suppress(OSError):
        return time.time() - path.stat().st_mtime < SILENT_S
    return False


def read(path: Path) -> tuple[dict[str, str | int], int, int] | None:
    """Return what a ledger says: whose it is, spans recorded and not let go, and those sent."""
    with suppress(OSError, ValueError):
        content = path.read_bytes().ljust(SIZE, b"\0")
        counters = memoryview(content)[:_ABOUT].cast("Q")
        about = orjson.loads(content[_ABOUT:].partition(b"\0")[0])
        gone = counters[GONE]
        return about, sum(counters[SPANS:GONE]) - gone, max(0, counters[SENT] - gone)
    return None


os.register_at_fork(after_in_child=_made.clear)  # those are the parent's


def _mapped(directory: str) -> mmap.mmap:
    path = file_of(directory, "count")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        os.posix_fallocate(file, 0, SIZE)  # a page that a full disk has no room for kills
        return mmap.mmap(file, SIZE)
    finally:
        os.close(file)
