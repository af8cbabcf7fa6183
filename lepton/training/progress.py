"""Progress of a run, read from its step log: the same source as the verdict afterwards."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

POLL_S = 0.2


@contextmanager
def watch(folder: Path, steps: int, *, show: bool) -> Generator[None]:
    """Show a bar on standard error while the block runs; nothing is left behind."""
    console = Console(stderr=True)
    if not show or not console.is_terminal:
        yield
        return
    stop = threading.Event()
    bar = Progress(
        TextColumn("training {task.fields[name]}"),
        BarColumn(),
        TextColumn("step {task.completed}/{task.total}  loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
    )
    with bar:
        task = bar.add_task("", total=steps, name=folder.name, loss="-")

        def follow() -> None:
            while not stop.wait(POLL_S):
                found = newest_step(folder)
                if found:
                    bar.update(task, completed=found[0], loss=f"{found[1]:.4f}")

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


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
