"""Writing checkpoints beside training: the step waits for the copy, not for the disk."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton import checkpoints, telemetry
from lepton.checkpoints import Manifest
from lepton.telemetry import Carrier

if TYPE_CHECKING:
    import torch


class Saver:
    """Writes one checkpoint at a time, in a thread, from a copy of the state.

    The copy's memory is used again for the next one, so a checkpoint waits for the one before.

    Args:
        folder: the run's checkpoint folder.
        carrier: the span that checkpoints are recorded under.

    Attributes:
        saved: the newest that was committed here.
    """

    def __init__(self, folder: Path, carrier: Carrier) -> None:
        self.saved: Manifest | None = None
        self._folder = folder
        self._carrier = carrier
        self._copy: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, step: int, attached: Mapping[str, Any], **described: Any) -> None:
        """Copy the state and begin to write it.

        Args:
            step: optimiser steps made.
            attached: name to what has a state.
            described: further arguments of :func:`lepton.checkpoints.write`.

        Raises:
            CheckpointError: the state cannot be held, or the checkpoint before failed.
        """
        self.wait()
        state = {name: thing.state_dict() for name, thing in attached.items()}
        self._copy, tree = checkpoints.flatten(state, self._copy)
        flat = (self._copy, tree)
        self._thread = threading.Thread(
            target=self._write, args=(flat, step, described), name="lepton-checkpoint"
        )
        self._thread.start()

    def wait(self) -> Manifest | None:
        """Wait until what was begun is committed; return the newest checkpoint made here.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self.saved

    def _write(self, flat: tuple[Any, Any], step: int, described: Mapping[str, Any]) -> None:
        try:
            with telemetry.span(
                "lepton.checkpoint", self._carrier, attributes={"lepton.step": step}
            ) as span:
                self.saved = checkpoints.write(
                    self._folder,
                    flat,
                    step=step,
                    traceparent=span.carrier.traceparent,
                    **described,
                )
                span.set(lepton_bytes=self.saved.size)
        except Exception as e:  # noqa: BLE001 - raised in the training thread, by the next wait
            self._error = e
