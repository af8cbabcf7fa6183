"""Reading checkpoints: only what a manifest vouches for exists."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from lepton.checkpoints.manifest import Manifest, parsed
from lepton.checkpoints.shards import SHARDS, Fill, Laid, held, lying, whole
from lepton.checkpoints.states import joined
from lepton.checkpoints.storage import Storage, storage_of
from lepton.errors import CheckpointError

if TYPE_CHECKING:
    import torch

STATE, TREE = "state.safetensors", "state.json"
BASE = "base.safetensors"
"""What a run does not train, in one file that all its checkpoints share."""

Where = str | os.PathLike[str]
Options = Mapping[str, str] | None


class Unreachable(CheckpointError):  # noqa: N818 - no word on the checkpoint itself
    """The storage does not answer or refuses, so nothing is known: no reason to take another."""


def load(uri: Where, options: Options = None) -> Manifest:
    """Read a manifest; the data files are checked by :func:`verify`.

    Args:
        uri: of the manifest.
        options: how to reach an object store; default the environment's settings.

    Raises:
        CheckpointError: no manifest there, or not one that this lepton reads.
    """
    folder, _, name = os.fspath(uri).rpartition("/")
    return _read(storage_of(folder or ".", options), name, options)


def _read(storage: Storage, name: str, options: Options) -> Manifest:
    uri = f"{storage.where}/{name}"
    try:
        return parsed(storage.read(name), uri, options)
    except FileNotFoundError as e:
        raise CheckpointError(f"no checkpoint at {uri}") from e
    except OSError as e:
        raise Unreachable(f"cannot read checkpoint {uri}: {e}") from e


def verify(manifest: Manifest, *, thorough: bool = True, without: Collection[str] = ()) -> None:
    """Check every data file against its hash.

    Args:
        manifest: of the checkpoint.
        thorough: on an object store this downloads what is not here yet; otherwise sizes must do.
        without: files that need not be whole.

    Raises:
        CheckpointError: a file is missing or differs.
    """
    storage = manifest.storage
    for name, expected in manifest.files.items():
        if name in without:
            continue
        try:
            storage.check(manifest.place(name), expected, thorough=thorough)
        except OSError as e:
            raise Unreachable(f"checkpoint {manifest.uri}: {name} cannot be read: {e}") from e


def restore(
    manifest: Manifest, fill: Fill | None = None, *, without: Collection[str] = ()
) -> dict[str, Any]:
    """Return the saved state, name to ``state_dict()``, after checking every hash.

    Args:
        manifest: of the checkpoint; tensors of a sharded model are put together.
        fill: makes other tensors of what was saved, such as this rank's part.
        without: files that need not be whole, as the state is not in them.

    Raises:
        CheckpointError: a file is missing, differs, or cannot be decoded.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    verify(manifest, without=without)
    try:
        names = [name for name in (BASE, STATE) if name in manifest.files]  # the latter wins
        saved = {p: held(t) for n in names for p, t in load_file(manifest.path(n)).items()}
        if SHARDS in manifest.files:
            saved |= lying(manifest.path)
        tree = json.loads(manifest.path(TREE).read_text())
        tensors = {path: _filled(path, laid, fill) for path, laid in saved.items()}
    except (SafetensorError, ValueError) as e:
        raise CheckpointError(f"checkpoint {manifest.uri} cannot be decoded: {e}") from e
    return joined(tree, tensors)


def _filled(path: str, laid: Laid, fill: Fill | None) -> torch.Tensor:
    made = fill(path, laid) if fill else None
    return whole(laid) if made is None else made


def all_of(directory: Where, options: Options = None) -> list[Manifest]:
    """Return the committed checkpoints of a run, by step; unreadable manifests are left out.

    Raises:
        CheckpointError: the storage cannot be reached.
    """
    storage = storage_of(directory, options)
    found: list[Manifest] = []
    for name in _names(storage):
        try:
            found.append(_read(storage, name, options))
        except Unreachable:
            raise
        except CheckpointError:
            continue
    return found


def latest(
    directory: Where,
    options: Options = None,
    *,
    thorough: bool = True,
    without: Collection[str] = (),
) -> Manifest | None:
    """Return the newest checkpoint whose files all match, or None; see :func:`verify`.

    Raises:
        CheckpointError: the storage cannot be reached.
    """
    storage = storage_of(directory, options)
    for name in reversed(_names(storage)):
        try:
            manifest = _read(storage, name, options)
            verify(manifest, thorough=thorough, without=without)
        except Unreachable:
            raise
        except CheckpointError:
            continue
        return manifest
    return None


def _names(storage: Storage) -> list[str]:
    try:
        return storage.manifests()
    except OSError as e:
        raise Unreachable(f"cannot list the checkpoints in {storage.where}: {e}") from e
