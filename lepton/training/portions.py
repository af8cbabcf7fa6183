"""A rank's portion of a sharded checkpoint: copied in the step, written and committed beside it.

Every rank writes its tensors, then a *note* of what it wrote. Rank 0 looks for the notes and
commits what they tell. No collective is needed, so nobody waits for another in a step; and where a
worker is lost before it has left its note, nothing is committed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from lepton import checkpoints
from lepton.checkpoints import Manifest
from lepton.checkpoints.shards import Part, Shards, entry_of
from lepton.checkpoints.storage import storage_of
from lepton.errors import CheckpointError
from lepton.training.group import Group
from lepton.training.plan import Plan
from lepton.training.sharding import spread

Tensors = dict[str, torch.Tensor]

LOOK_S = 0.05
"""How often rank 0 looks for notes that are not there yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Portion:
    """A rank's copy of its portion of a state.

    Attributes:
        step: optimiser steps made.
        rank: whose portion it is.
        ranks: how many there are.
        folder: where all of them write.
        own: its parts of sharded tensors, by path.
        places: where in the whole these are.
        plain: tensors that all ranks have; rank 0's copy.
        whole: shape and data type of every sharded tensor.
        tree: what else the state holds.
    """

    step: int
    rank: int
    ranks: int
    folder: str
    own: Tensors
    places: Mapping[str, list[Part]]
    plain: Tensors
    whole: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    tree: Any

    @property
    def file(self) -> str:
        """Name of the file with its tensors."""
        return f"shard-{self.rank:04d}.safetensors"


def copied(attached: Mapping[str, Any], group: Group, step: int, into: Tensors) -> Portion:
    """Return a copy of this rank's portion.

    Args:
        attached: name to what has a state.
        group: the ranks.
        step: optimiser steps made.
        into: memory of an earlier copy, which nobody reads any more; it is used again.
    """
    state = {name: thing.state_dict() for name, thing in attached.items()}
    tensors, tree = checkpoints.split(state)
    file = f"shard-{group.rank:04d}.safetensors"
    parts = {path: t for path, t in tensors.items() if isinstance(t, DTensor)}
    own = {path: t.to_local() for path, t in parts.items() if _is_first(t)}
    own = {path: t for path, t in own.items() if t.numel()}
    plain = {path: t for path, t in tensors.items() if path not in parts and group.rank == 0}
    kept = {path: _copy(t, into.get(path)) for path, t in {**plain, **own}.items()}
    places: dict[str, list[Part]] = {}
    for path in own:
        whole = parts[path]
        shape, offset = spread(whole.shape, whole.device_mesh, whole.placements)
        places[path] = [Part(file, tuple(offset), tuple(shape))]
    into.clear()
    into.update(kept)
    return Portion(
        step=step,
        rank=group.rank,
        ranks=group.world_size,
        folder=f"data/step-{step:08d}-g{group.place.number:06d}",
        own={path: kept[path] for path in own},
        places=places,
        plain={path: kept[path] for path in plain},
        whole={path: (tuple(t.shape), t.dtype) for path, t in parts.items()},
        tree=tree,
    )


def _copy(tensor: torch.Tensor, memory: torch.Tensor | None) -> torch.Tensor:
    if memory is None or memory.shape != tensor.shape or memory.dtype != tensor.dtype:
        memory = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return memory.copy_(tensor.detach())


def _is_first(tensor: DTensor) -> bool:
    where = tensor.device_mesh.get_coordinate() or []
    return all(p.is_shard() or at == 0 for p, at in zip(tensor.placements, where, strict=True))


def write(plan: Plan, portion: Portion) -> None:
    """Write a portion and leave the note of it.

    Raises:
        CheckpointError: the storage is full or cannot be written; the note says so, if it can.
    """
    storage = storage_of(plan.kept_in, plan.options)
    note: dict[str, Any] = {"measured": None, "error": "", "places": {}}
    error: Exception | None = None
    try:
        if portion.own:
            told = (plan.kept_in, portion.folder, portion.file, portion.own, plan.options)
            note["measured"] = checkpoints.write_shard(*told)
        note["places"] = {p: [asdict(x) for x in found] for p, found in portion.places.items()}
    except CheckpointError as e:
        error, note["error"] = e, str(e)
    try:
        with storage.staged(portion.folder):
            pass  # a rank without a tensor has made no folder
        storage.replace(_note(portion.folder, portion.rank), json.dumps(note).encode())
    except OSError as e:
        error = error or CheckpointError(f"cannot write to {storage.where}/{portion.folder}: {e}")
    if error is not None:
        raise error


def commit(
    plan: Plan, portion: Portion, described: Mapping[str, Any], gone: Callable[[], bool]
) -> Manifest | None:
    """Wait for all ranks' notes, as rank 0, and commit what they tell.

    Args:
        plan: of the run.
        portion: rank 0's own, written.
        described: what the manifest says beside the state.
        gone: whether to wait no longer, as a worker is lost.

    Returns:
        the checkpoint; None if a note did not come.

    Raises:
        CheckpointError: a rank could not write, or the manifest cannot be.
    """
    notes: list[dict[str, Any]] = []
    for rank in range(portion.ranks):
        note = _await(plan, portion, rank, gone)
        if note is None:
            return None
        if note["error"]:
            raise CheckpointError(note["error"])
        notes.append(note)
    parts: dict[str, list[Part]] = {}
    for note in notes:
        for path, found in note["places"].items():
            parts.setdefault(path, []).extend(
                Part(p["file"], tuple(p["offset"]), tuple(p["shape"])) for p in found
            )
    files = {
        f"shard-{rank:04d}.safetensors": note["measured"]
        for rank, note in enumerate(notes)
        if note["measured"] is not None
    }
    layout = {
        path: entry_of(shape, dtype, parts.get(path, []))
        for path, (shape, dtype) in portion.whole.items()
    }
    shards = Shards(folder=portion.folder, files=files, layout=layout)
    return checkpoints.write(
        plan.kept_in,
        (portion.plain, portion.tree),
        step=portion.step,
        shards=shards,
        options=plan.options,
        **described,
    )


def _await(
    plan: Plan, portion: Portion, rank: int, gone: Callable[[], bool]
) -> dict[str, Any] | None:
    """Return a rank's note once it is there; None if it will not come."""
    storage = storage_of(plan.kept_in, plan.options)
    while True:
        last = gone()  # asked before: what was written by then is seen
        try:
            return json.loads(storage.read(_note(portion.folder, rank)))
        except FileNotFoundError:
            if last:
                return None
        except OSError as e:
            raise CheckpointError(
                f"cannot read what rank {rank} wrote to {storage.where}/{portion.folder}: {e}"
            ) from e
        time.sleep(LOOK_S)


def _note(folder: str, rank: int) -> str:
    return f"{folder}/shard-{rank:04d}.json"
