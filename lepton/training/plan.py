"""What every worker of a run is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lepton.stream import Shard
from lepton.stream.mixture import MixedShard
from lepton.telemetry import Carrier
from lepton.training.stopping import EarlyStopping
from lepton.training.validation import Settled

Opener = Callable[[int, int, Mapping[str, Any] | None, int], Shard | MixedShard]
"""Opens the shard of (rank, world size, cursor, generation)."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every worker of a run is told.

    Attributes:
        folder: the run's folder.
        checkpoint_every: steps between checkpoints.
        audit: keep the identity of every consumed row in the step log.
        lineage: recorded in every checkpoint.
        preparation: JSON of the preparation, or None.
        carrier: the run's span.
        session: id of this call of train(): attempts that share it follow a failure.
        seed: for torch's random numbers, mixed with rank and step.
        lanes: of the stream.
        keep: newest checkpoints that stay; None: all.
        keep_best: best ones that stay beside them.
        exact: sum gradients lane by lane, so that the world size does not change a bit.
        checkpoints: where checkpoints go: a folder, or a URL of an object store.
        options: how that object store is reached.
        steps: planned over all epochs.
        validation: what the run is judged by on the way, or None.
        stop: when it ends before its last step, or None.
        tensorboard: folder of TensorBoard files, or None.
        trainable_only: checkpoints hold what is trained, and refer to the rest.
        code: module that the loop is of; its logs are the run's.
    """

    folder: str
    checkpoint_every: int
    audit: bool
    lineage: Mapping[str, Any]
    preparation: str | None
    carrier: Carrier
    session: str
    seed: int
    lanes: int = 1
    keep: int | None = None
    keep_best: int = 1
    exact: bool = False
    checkpoints: str = ""
    options: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    steps: int = 0
    validation: Settled | None = None
    stop: EarlyStopping | None = None
    tensorboard: str | None = None
    trainable_only: bool = False
    code: str = "__main__"

    @property
    def kept_in(self) -> str:
        """Where checkpoints go: by default below the run's folder."""
        return self.checkpoints or f"{self.folder}/checkpoints"
