"""What a run says when it stops by itself. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lepton.checkpoints import Manifest
from lepton.stream import Part
from lepton.stream.mixture import MixedPart
from lepton.stream.order import place_of


def not_finite(
    lineage: Mapping[str, Any],
    step: int,
    part: Part | MixedPart,
    rows: Mapping[int, Sequence[int]],
) -> str:
    """Describe a loss that is no finite number.

    Args:
        lineage: of the run, for the table's name.
        step: the last good one.
        part: a slice of the global batch that gave it.
        rows: by rank, identities of the first rows of the slices whose loss it is.
    """
    table = f"{lineage['table']}@{lineage['table_version']}"
    first = {rank: [place_of(i) for i in ids] for rank, ids in rows.items()}
    return (
        f"the loss of step {step + 1} (epoch {part.epoch}, global batch {part.step}) is not a "
        f"finite number; the weights of step {step} are checkpointed. Rows of {table} in it, by "
        f"rank, as (file, row) from the slice's first: {first}. Look at these rows, lower the "
        "learning rate or clip the gradients"
    )


def uneven(ended: int, world_size: int, step: int) -> str:
    """Describe ranks of which only some have ended their loops."""
    return (
        f"{ended} of {world_size} ranks ended their loop after step {step}, the others did not: "
        "every rank must make every step; decide to stop by something that is equal on all ranks, "
        "such as what worker.step returns"
    )


def unwritable(folder: str, step: int, error: OSError, whole: Sequence[Manifest]) -> str:
    """Describe a run whose folder takes no more.

    Args:
        folder: of the run.
        step: under way.
        error: what the system says.
        whole: the run's checkpoints, by step.
    """
    last = f"the last whole checkpoint is {whole[-1].uri}" if whole else "there is no checkpoint"
    return (
        f"step {step} cannot be written to the step log in {folder} ({error}); {last}: make room "
        "or mend the permissions, then train again by the same name to go on"
    )
