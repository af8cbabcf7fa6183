"""Writing checkpoints: data files first, the manifest last."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton.checkpoints.manifest import Manifest
from lepton.checkpoints.reading import STATE, TREE, Options, Where, all_of, load, verify
from lepton.checkpoints.shards import SHARDS, Shards
from lepton.checkpoints.states import flatten
from lepton.checkpoints.storage import Storage, measured, storage_of, swept
from lepton.errors import CheckpointError

if TYPE_CHECKING:
    from lepton.checkpoints.states import Tensors

PROGRAM, ANSWERS = "program.pt2", "answers.safetensors"


def save(
    directory: Where,
    *,
    step: int,
    state: Mapping[str, Any],
    cursor: Mapping[str, Any],
    program: Path | None = None,
    options: Options = None,
    **described: Any,
) -> Manifest:
    """Write a checkpoint and commit it.

    Args:
        directory: the run's checkpoint folder, or its URL on an object store.
        step: optimiser steps made.
        state: name to ``state_dict()`` of everything that has one.
        cursor: the stream's state.
        program: an exported program to keep with it.
        options: how to reach an object store.
        described: further fields of :class:`Manifest`.
    """
    described = {"cursor": cursor, "program": program, "options": options, **described}
    return write(directory, flatten(state), step=step, **described)


def write(
    directory: Where,
    flat: tuple[Tensors, Any],
    *,
    step: int,
    cursor: Mapping[str, Any],
    program: Path | None = None,
    answers: Tensors | None = None,
    shards: Shards | None = None,
    shared: Mapping[str, Mapping[str, Any]] | None = None,
    options: Options = None,
    written: Callable[[], object] | None = None,
    **described: Any,
) -> Manifest:
    """Write a state that :func:`flatten` has copied and commit it; see :func:`save`.

    ``answers`` are rows and the net's answers to them, to be kept with it; ``shards`` is what other
    ranks, and this one, have written of it by :func:`write_shard`; ``shared`` what
    :func:`write_shared` has; ``written`` is called when only the manifest is missing.

    Raises:
        CheckpointError: the storage is full or cannot be written; nothing was committed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    storage = storage_of(directory, options)
    folder = shards.folder if shards else f"data/step-{step:08d}-{secrets.token_hex(4)}"
    tensors, tree = flat
    try:
        with swept(storage, folder):
            with storage.staged(folder) as place:
                save_file(tensors, place / STATE)
                (place / TREE).write_text(json.dumps(tree))
                if program is not None:
                    shutil.copyfile(program, place / PROGRAM)
                if answers:
                    save_file(answers, place / ANSWERS)
                if shards:
                    (place / SHARDS).write_text(json.dumps(shards.layout))
                mine = (STATE, TREE, PROGRAM, ANSWERS, SHARDS)
                files = {n: measured(place / n) for n in mine if (place / n).exists()}
            manifest = Manifest(
                uri=f"{storage.where}/step-{step:08d}.json",
                step=step,
                cursor=dict(cursor),
                files={**files, **(shards.files if shards else {}), **(shared or {})},
                folder=folder,
                options=dict(options or {}),
                **described,
            )
            if written is not None:
                written()
            _commit(storage, manifest)
    except (OSError, SafetensorError) as e:  # the latter is what safetensors calls a full disk
        raise _unwritable(storage, step, e, options) from e
    return load(manifest.uri, options)


def write_shard(
    directory: Where, folder: str, name: str, tensors: Tensors, options: Options = None
) -> dict[str, Any]:
    """Write a rank's part of a sharded state; nobody sees it before :func:`write` commits it.

    Args:
        directory: the run's checkpoint folder, or its URL on an object store.
        folder: the data folder, the same for all ranks.
        name: of the file, another for each rank.
        tensors: by path in the state.
        options: how to reach an object store.

    Returns:
        the file's ``{"sha256", "bytes"}``.

    Raises:
        CheckpointError: the storage is full or cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    storage = storage_of(directory, options)
    try:
        with storage.staged(folder) as place:
            save_file(tensors, place / name)
            return measured(place / name)
    except (OSError, SafetensorError) as e:
        raise _unwritable(storage, int(folder.split("-")[1]), e, options) from e


def write_shared(
    directory: Where,
    step: int,
    files: Mapping[str, Tensors | Path],
    options: Options = None,
) -> dict[str, dict[str, Any]]:
    """Write files that several checkpoints refer to; nobody sees them before one does.

    Args:
        directory: the run's checkpoint folder, or its URL on an object store.
        step: of the first of these checkpoints.
        files: what goes into each, by name: tensors, or a file to be copied.
        options: how to reach an object store.

    Returns:
        for :func:`write`: file name to ``{"sha256", "bytes", "in"}``.

    Raises:
        CheckpointError: the storage is full or cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    storage = storage_of(directory, options)
    folder = f"data/base-{step:08d}-{secrets.token_hex(4)}"
    try:
        with swept(storage, folder), storage.staged(folder) as place:
            for name, content in files.items():
                if isinstance(content, Path):
                    shutil.copyfile(content, place / name)
                else:
                    save_file(content, place / name)
            return {name: {**measured(place / name), "in": folder} for name in files}
    except (OSError, SafetensorError) as e:
        raise _unwritable(storage, step, e, options) from e


def _unwritable(storage: Storage, step: int, error: Exception, options: Options) -> CheckpointError:
    whole: list[Manifest] = []
    with suppress(CheckpointError):
        whole = all_of(storage.where, options)
    last = f"the last whole checkpoint is {whole[-1].uri}" if whole else "there is none before"
    return CheckpointError(
        f"cannot write the checkpoint of step {step} to {storage.where} ({error}); {last}: make "
        "room or mend the permissions, then train again by the same name to go on"
    )


def _commit(storage: Storage, manifest: Manifest) -> None:
    """Put a manifest in place; a valid one of the same step stays."""
    body = manifest.to_bytes()
    if storage.create(manifest.name, body):
        return
    try:
        verify(load(manifest.uri, manifest.options))
    except CheckpointError:
        storage.replace(manifest.name, body)


def remove(manifest: Manifest) -> None:
    """Delete a checkpoint; it is invisible from the first moment on.

    Raises:
        CheckpointError: the storage does not let it go.
    """
    storage = manifest.storage
    try:
        storage.remove(manifest.name)
        storage.remove_folder(manifest.folder)
    except OSError as e:
        raise CheckpointError(f"cannot remove checkpoint {manifest.uri}: {e}") from e


def prune(directory: Where, options: Options = None) -> int:
    """Delete data folders that no manifest names (of killed writers); return how many."""
    storage = storage_of(directory, options)
    named = {folder for m in all_of(directory, options) for folder in m.folders}
    try:
        orphans = [folder for folder in storage.folders() if folder not in named]
        for orphan in orphans:
            storage.remove_folder(orphan)
    except OSError as e:
        raise CheckpointError(f"cannot prune the checkpoints in {storage.where}: {e}") from e
    return len(orphans)
