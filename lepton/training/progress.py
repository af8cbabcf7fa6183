"""Progress of a run, read from its step log: the same source as the verdict afterwards.

On a terminal one live line, with a line above it for whatever happens to the workers; in a notebook
one that is written over in its cell; elsewhere a plain line now and then.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lepton.training import evaluations
from lepton.training.evaluations import Judged
from lepton.training.rendezvous import Event
from lepton.training.steps import attempts_of

POLL_S = 0.2
PLAIN_S = 10.0
"""Seconds between two lines where there is no terminal."""


@dataclass
class Line:
    """The line of one run.

    Attributes:
        name: of the run.
        total: steps it will have.
        batch_size: rows of a global batch.
        console: where it is shown; None: nowhere.
    """

    name: str
    total: int
    batch_size: int
    console: Console | None
    _seen: int = 0
    _began: tuple[int, float] | None = None
    _plain_at: float = field(default_factory=time.monotonic)

    def tell(self, events: list[Event]) -> None:
        """Say what has happened to the workers since the last time."""
        made_good = replacements(events)
        for event in events[self._seen :]:
            text = described(event, made_good.get(event.time_ns))
            if text and self.console is not None:
                self.console.print(f"run {self.name}: {text}", highlight=False)
        self._seen = len(events)

    def text(self, step: int, loss: float, workers: int, judged: Judged | None = None) -> str:
        """Return the figures of a moment, with the rate since the first one seen."""
        now = time.monotonic()
        self._began = self._began or (step, now)
        steps, seconds = step - self._began[0], now - self._began[1]
        rate = steps / seconds if seconds > 0 else 0.0
        left = f"  {(self.total - step) / rate:.0f} s left" if rate > 0 else ""
        rows = f"  {rate * self.batch_size:,.0f} rows/s" if rate > 0 else ""
        found = next(iter(judged.metrics.items()), None) if judged else None
        figure = f"  {found[0]} {found[1]:.4f}" if found else ""
        return f"step {step}/{self.total}  loss {loss:.4f}{figure}{rows}  {workers} workers{left}"

    def plain(self, text: str) -> None:
        """Print a line if the last one is some time ago."""
        if self.console is not None and time.monotonic() - self._plain_at > PLAIN_S:
            self._plain_at = time.monotonic()
            self.console.print(f"run {self.name}: {text}", highlight=False)


def replacements(events: Sequence[Event]) -> dict[int, Event]:
    """Return which loss each newcomer makes good, the earliest first, by when it joined. Pure."""
    lost: list[Event] = []
    found: dict[int, Event] = {}
    for event in events:
        if event.kind == "lost":
            lost.append(event)
        elif event.kind == "joined" and lost:
            found[event.time_ns] = lost.pop(0)
    return found


def described(event: Event, lost: Event | None = None) -> str:
    """Return an event in words; empty for what every run does.

    Args:
        event: what happened.
        lost: the loss that it makes good, if it does.
    """
    now = f"{event.world_size} train" if event.world_size != 1 else "1 trains"
    match event.kind:
        case "lost":
            return f"worker {event.who} lost after step {event.step}"
        case "hung":
            return f"worker {event.who} does not move since step {event.step}, it is replaced"
        case "slow":
            return f"worker {event.who} is slow after step {event.step}: {event.detail}"
        case "joined":
            replaced = ""
            if lost is not None:
                seconds = (event.time_ns - lost.time_ns) / 1e9
                replaced = f", in place of {lost.who} {seconds:.1f} s after its loss"
            return f"worker {event.who} joined after step {event.step}{replaced}, {now}"
        case "left":
            return f"worker {event.who} left after step {event.step}, its node goes away"
        case _:
            return ""


@contextmanager
def watch(folder: Path, steps: int, batch_size: int, *, show: bool) -> Generator[Line]:
    """Show a run's progress on standard error, or in the notebook's cell, while the block runs."""
    console = Console(stderr=True, force_jupyter=False) if show else None
    line = Line(folder.name, steps, batch_size, console)
    if console is None:
        yield line
        return
    stop = threading.Event()
    with _shown(line, console, folder) as tell:

        def look() -> None:
            found = newest_step(folder)
            lives = attempts_of(folder / "steps")
            if found is not None and lives:
                judged = next(reversed(evaluations.read(folder)), None)
                tell(found[0], line.text(*found, lives[-1].world_size, judged))

        def follow() -> None:
            while not stop.wait(POLL_S):
                look()

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield line
        finally:
            stop.set()
            thread.join()
            look()


@contextmanager
def _shown(line: Line, console: Console, folder: Path) -> Generator[Callable[[int, str], None]]:
    """Where the line goes; what is given is called with the step and the text."""
    cell = _cell(f"training {folder.name}: starting")
    if cell is not None:
        yield lambda _, text: cell(f"training {folder.name}: {text}")
        return
    if not console.is_terminal:
        yield lambda _, text: line.plain(text)
        return
    bar = Progress(
        TextColumn("training {task.fields[name]}"),
        BarColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
    )
    with bar:
        task = bar.add_task("", total=line.total, name=folder.name, text="starting")
        yield lambda step, text: bar.update(task, completed=step, text=text)


def _cell(text: str) -> Callable[[str], None] | None:
    """Show a text in the notebook's cell; return what writes over it, or None elsewhere."""
    shell: Any = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is None or not hasattr(shell, "kernel"):
        return None
    shown: Any = sys.modules["IPython"].display
    handle: Any = shown.display({"text/plain": text}, raw=True, display_id=True)
    return lambda text: handle.update({"text/plain": text}, raw=True)


def newest_step(folder: Path) -> tuple[int, float] | None:
    """Return the last step that any rank of the newest attempts saw made, and its loss."""
    logs = sorted((folder / "steps").glob("*.jsonl"))
    for log in reversed(logs[-8:]):
        with log.open("rb") as f:
            f.seek(max(0, log.stat().st_size - 1_000_000))
            lines = f.read().split(b"\n")[:-1]
        for line in reversed(lines):
            if line.startswith(b'{"made"'):
                last = json.loads(line)
                return int(last["made"]), float(last["loss"])
    return None
