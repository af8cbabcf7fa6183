"""What killed processes took with them: spans that were recorded, and never written or sent."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import orjson

from lepton.telemetry import ledger
from lepton.telemetry.context import Carrier
from lepton.telemetry.store import aside_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """What one process took with it.

    Attributes:
        process: its name and id, as spans have it.
        trace_id: of its first span; empty if it only answered for others.
        lost: spans that were recorded, and are neither in its file nor to be.
        unsent: spans in its file that no collector took, where it was to send them.
    """

    process: str
    trace_id: str
    lost: int
    unsent: int

    def __str__(self) -> str:
        """Say it in words."""
        parts = [f"{self.lost} {_spans(self.lost)} of {self.process} lost"] if self.lost else []
        if self.unsent:
            parts.append(f"{self.unsent} {_spans(self.unsent)} of {self.process} not sent")
        return ", ".join(parts)


def losses_of(directory: str, *, ended: bool = True, trace_id: str | None = None) -> list[Loss]:
    """Return what processes lost, by process; only those that did.

    Args:
        directory: of span files.
        ended: whether to leave out processes that still run: they may yet write. Those of other
            machines count as running until they were silent for a minute.
        trace_id: of the first span of the processes that are wanted; None for all. The span files
            of others are not read.
    """
    found: list[Loss] = []
    for path in sorted(Path(directory).glob("*.count")):
        told = ledger.read(path)
        if told is None or trace_id not in (None, told[0]["trace_id"]):
            continue
        if ended and _runs(told[0], path):
            continue
        about, recorded, sent = told
        written = _written(path.with_suffix(".jsonl"))
        unsent = max(0, written - sent) if sent else 0
        loss = Loss(
            process=str(about["process"]),
            trace_id=str(about["trace_id"]),
            lost=max(0, recorded - written),
            unsent=unsent,
        )
        if loss.lost or loss.unsent:
            found.append(loss)
    return found


def lost_spans(directory: str, trace: Carrier) -> int:
    """Return how many spans of a trace's own processes are lost; of those that run, none."""
    return sum(loss.lost for loss in losses_of(directory, trace_id=trace.trace_id))


def _runs(about: dict[str, str | int], path: Path) -> bool:
    if about["host"] != socket.gethostname():
        return ledger.has_beaten(path)
    with suppress(OSError):
        os.kill(int(about["pid"]), 0)
        if about.get("began", 0) not in (0, ledger.began_at(int(about["pid"]))):
            return False
        state = Path(f"/proc/{about['pid']}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX"
    return False


def _written(path: Path) -> int:
    """Spans in a file; one that was written as it stood, and then as it ended, is one."""
    ids: set[str] = set()
    for file in (aside_of(path), path):
        with suppress(FileNotFoundError), file.open("rb") as lines:
            for line in lines:
                with suppress(ValueError):
                    ids.add(orjson.loads(line)["span_id"])
    return len(ids)


def _spans(number: int) -> str:
    return "span" if number == 1 else "spans"
