"""TensorBoard's files of a run, written by rank 0 with the writer that Ray Train brings along.

A run that goes on from a checkpoint writes a further file, which tells TensorBoard to forget the
steps that are made again.
"""

from __future__ import annotations

import os
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from lepton.training.evaluations import Judged

FLUSH_S = 5


def folder_of(asked: bool | str | os.PathLike[str], run: Path) -> str | None:
    """Return where the files go, or None if none are wanted."""
    if isinstance(asked, bool):
        return str(run / "tensorboard") if asked else None
    return str(Path(asked).absolute())


class Board:
    """One worker's part in the files; silent unless it is open.

    Args:
        folder: where they go; None: there are none.
    """

    def __init__(self, folder: str | None) -> None:
        self._folder = folder
        self._writer: Any = None
        self._last_ns = 0

    def open(self, step: int) -> None:
        """Begin a file after a step; what other files say of later steps no longer counts."""
        if self._folder is None:
            return
        writer: Any = import_module("tensorboardX").SummaryWriter  # which has no types
        self._last_ns = 0
        self._writer = writer(
            self._folder,
            purge_step=step + 1,
            flush_secs=FLUSH_S,
            filename_suffix=f".{time.time_ns()}",  # two files of one second have one name otherwise
        )

    def close(self) -> None:
        """End the file."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def made(self, step: int, loss: float, time_ns: int, rows: int, world_size: int) -> None:
        """Write that a step was made.

        Args:
            step: its number.
            loss: mean over the global batch.
            time_ns: when, Unix nanoseconds.
            rows: of the global batch.
            world_size: workers that made it.
        """
        if self._writer is None:
            return
        figures = {"train/loss": loss, "train/workers": world_size}
        if self._last_ns:
            figures["train/rows_per_second"] = rows * 1e9 / max(1, time_ns - self._last_ns)
        self._last_ns = time_ns
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step, time_ns / 1e9)

    def judged(self, judged: Judged) -> None:
        """Write what an evaluation found."""
        if self._writer is None:
            return
        for name, value in judged.metrics.items():
            self._writer.add_scalar(f"validate/{name}", value, judged.step, judged.time_ns / 1e9)
