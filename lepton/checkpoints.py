"""Checkpoints: whole or invisible.

A checkpoint is a folder of data files and a *manifest* beside it, put in place last by a link
that fails if the name is taken. The manifest holds the SHA-256 of every data file: what it does
not vouch for does not exist. Tensors are safetensors; everything else is JSON. No pickle.

    checkpoints/
      step-00000120.json          the manifest: the commit point
      data/step-00000120-<id>/    state.safetensors, state.json, program.pt2, answers.safetensors
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lepton.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

VERSION = 1
STATE, TREE, PROGRAM = "state.safetensors", "state.json", "program.pt2"
ANSWERS = "answers.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a checkpoint vouches for.

    Attributes:
        uri: path of the manifest itself.
        step: optimiser steps made.
        cursor: where the stream stands, from ``state_dict()``.
        files: file name to ``{"sha256", "bytes"}``.
        folder: data folder, relative to the manifest's.
        lineage: table uri and version, columns, filter, seed, batch size, lanes, code version, …
        preparation: JSON of the preparation, or None.
        signature: inputs and outputs of the exported program, or None.
        program_error: why the net could not be exported, if it could not.
        metrics: figures known at that step.
        traceparent: the span under which it was written.
    """

    uri: str
    step: int
    cursor: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    folder: str
    lineage: Mapping[str, Any] = field(default_factory=dict[str, Any])
    preparation: str | None = None
    signature: Mapping[str, Any] | None = None
    program_error: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    traceparent: str = ""

    @property
    def sha256(self) -> str:
        """Hash of the manifest file: the checkpoint's identity."""
        return hashlib.sha256(Path(self.uri).read_bytes()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all data files."""
        return sum(int(f["bytes"]) for f in self.files.values())

    def path(self, name: str) -> Path:
        """Return the full path of a data file.

        Raises:
            CheckpointError: the checkpoint has no such file.
        """
        if name not in self.files:
            raise CheckpointError(f"checkpoint {self.uri} has no {name}; it has {list(self.files)}")
        return Path(self.uri).parent / self.folder / name


def save(
    directory: str | os.PathLike[str],
    *,
    step: int,
    state: Mapping[str, Any],
    cursor: Mapping[str, Any],
    program: Path | None = None,
    **described: Any,
) -> Manifest:
    """Write a checkpoint and commit it.

    Args:
        directory: the run's checkpoint folder.
        step: optimiser steps made.
        state: name to ``state_dict()`` of everything that has one.
        cursor: the stream's state.
        program: an exported program to keep with it.
        described: further fields of :class:`Manifest`.
    """
    return write(directory, flatten(state), step=step, cursor=cursor, program=program, **described)


def write(
    directory: str | os.PathLike[str],
    flat: tuple[Tensors, Any],
    *,
    step: int,
    cursor: Mapping[str, Any],
    program: Path | None = None,
    answers: Tensors | None = None,
    **described: Any,
) -> Manifest:
    """Write a state that :func:`flatten` has copied and commit it; see :func:`save`.

    ``answers`` are rows and the net's answers to them, to be kept with it.

    Raises:
        CheckpointError: the disk is full or cannot be written; nothing was committed.
    """
    from safetensors import SafetensorError

    root = Path(directory)
    folder = f"data/step-{step:08d}-{secrets.token_hex(4)}"
    try:
        (root / folder).mkdir(parents=True)
        if program is not None:
            shutil.copyfile(program, root / folder / PROGRAM)
        if answers:
            _save_tensors(root / folder / ANSWERS, answers)
        return _write(root, folder, flat, step=step, cursor=cursor, **described)
    except (OSError, SafetensorError) as e:  # the latter is what safetensors calls a full disk
        shutil.rmtree(root / folder, ignore_errors=True)
        whole = all_of(root)
        last = f"the last whole checkpoint is {whole[-1].uri}" if whole else "there is none before"
        raise CheckpointError(
            f"cannot write the checkpoint of step {step} to {root} ({e}); {last}: make room or "
            "mend the permissions, then train again by the same name to go on"
        ) from e


def _write(
    root: Path,
    folder: str,
    flat: tuple[Tensors, Any],
    *,
    step: int,
    cursor: Mapping[str, Any],
    **described: Any,
) -> Manifest:
    tensors, tree = flat
    _save_tensors(root / folder / STATE, tensors)
    (root / folder / TREE).write_text(json.dumps(tree))
    files = {p.name: _measure(p) for p in sorted((root / folder).iterdir())}
    target = root / f"step-{step:08d}.json"
    manifest = Manifest(
        uri=str(target), step=step, cursor=dict(cursor), files=files, folder=folder, **described
    )
    body = {"v": VERSION, **{k: v for k, v in asdict(manifest).items() if k != "uri"}}
    _commit(target, json.dumps(body, indent=1).encode())
    return load(target)


def load(uri: str | os.PathLike[str]) -> Manifest:
    """Read a manifest; the data files are checked by :func:`verify`.

    Raises:
        CheckpointError: no manifest there, or not one that this lepton reads.
    """
    path = Path(uri)
    try:
        body = json.loads(path.read_bytes())
        if body.pop("v") != VERSION:
            raise CheckpointError(f"checkpoint {path} was written by another lepton: use that one")
        return Manifest(uri=str(path), **body)
    except FileNotFoundError as e:
        raise CheckpointError(f"no checkpoint at {path}") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{path} is not a lepton checkpoint manifest: {e}") from e


def verify(manifest: Manifest) -> None:
    """Check every data file against its hash.

    Raises:
        CheckpointError: a file is missing or differs.
    """
    for name, expected in manifest.files.items():
        path = manifest.path(name)
        if not path.is_file():
            raise CheckpointError(f"checkpoint {manifest.uri}: {name} is missing")
        if _measure(path)["sha256"] != expected["sha256"]:
            raise CheckpointError(
                f"checkpoint {manifest.uri}: {name} does not match its hash; it is damaged, use "
                "an earlier checkpoint"
            )


def restore(manifest: Manifest) -> dict[str, Any]:
    """Return the saved state, name to ``state_dict()``, after checking every hash."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    verify(manifest)
    try:
        tensors = load_file(manifest.path(STATE))
        tree = json.loads(manifest.path(TREE).read_text())
    except (SafetensorError, ValueError) as e:
        raise CheckpointError(f"checkpoint {manifest.uri} cannot be decoded: {e}") from e
    return joined(tree, tensors)


def all_of(directory: str | os.PathLike[str]) -> list[Manifest]:
    """Return the committed checkpoints of a run, by step; unreadable manifests are left out."""
    found: list[Manifest] = []
    for path in sorted(Path(directory).glob("step-*.json")):
        try:
            found.append(load(path))
        except CheckpointError:
            continue
    return found


def latest(directory: str | os.PathLike[str]) -> Manifest | None:
    """Return the newest checkpoint whose files all match their hashes, or None."""
    for manifest in reversed(all_of(directory)):
        try:
            verify(manifest)
        except CheckpointError:
            continue
        return manifest
    return None


def remove(manifest: Manifest) -> None:
    """Delete a checkpoint; it is invisible from the first moment on."""
    uri = Path(manifest.uri)
    uri.unlink(missing_ok=True)
    shutil.rmtree(uri.parent / manifest.folder, ignore_errors=True)


def prune(directory: str | os.PathLike[str]) -> int:
    """Delete data folders that no manifest names (of killed writers); return how many."""
    root = Path(directory)
    named = {m.folder for m in all_of(root)}
    orphans = [p for p in root.glob("data/*") if f"data/{p.name}" not in named]
    for orphan in orphans:
        shutil.rmtree(orphan, ignore_errors=True)
    return len(orphans)


def flatten(state: Any, into: Tensors | None = None) -> tuple[Tensors, Any]:
    """Return copies in CPU memory of all tensors, by path, and a JSON tree of the rest.

    Args:
        state: nested dicts, lists and tuples.
        into: tensors that a former call returned, and nobody reads any more: those of the same
            shape are written over, which is several times faster than new memory.

    Raises:
        CheckpointError: a leaf is neither a tensor nor a plain value.
    """
    import torch

    tensors, tree = split(state)
    copies: Tensors = {}
    for path, tensor in tensors.items():
        copy = (into or {}).get(path)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        copies[path] = copy.copy_(tensor)
    return copies, tree


def split(state: Any) -> tuple[Tensors, Any]:
    """Return all tensors of a state, by path and not copied, and a JSON tree of the rest.

    Raises:
        CheckpointError: a leaf is neither a tensor nor a plain value.
    """
    tensors: Tensors = {}
    return tensors, _flatten(state, "", tensors)


def joined(tree: Any, tensors: Tensors) -> dict[str, Any]:
    """Put a state together again from what :func:`split` or :func:`flatten` returned."""
    return cast("dict[str, Any]", _unflatten(tree, tensors))


def _flatten(value: Any, path: str, tensors: Tensors) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach()
        return {"$tensor": path}
    if isinstance(value, Mapping):
        pairs = cast("Mapping[Any, Any]", value).items()
        return {"$dict": [[k, _flatten(v, f"{path}/{k}", tensors)] for k, v in pairs]}
    if isinstance(value, list | tuple):
        kind = "$list" if isinstance(value, list) else "$tuple"
        items = cast("list[Any]", value)
        return {kind: [_flatten(v, f"{path}/{i}", tensors) for i, v in enumerate(items)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(
        f"state {path!r} is a {type(value).__name__}, which a checkpoint cannot hold without "
        "pickle: keep tensors, numbers, strings, lists and dicts in state_dict()"
    )


def _unflatten(tree: Any, tensors: Tensors) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, body),) = cast("dict[str, Any]", tree).items()
    if kind == "$tensor":
        return tensors[body]
    if kind == "$dict":
        return {k: _unflatten(v, tensors) for k, v in body}
    items = [_unflatten(v, tensors) for v in body]
    return items if kind == "$list" else tuple(items)


def _save_tensors(path: Path, tensors: Tensors) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path)


def _measure(path: Path) -> dict[str, Any]:
    with path.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size}


def _commit(target: Path, body: bytes) -> None:
    """Put a manifest in place; a valid one of the same step stays."""
    temporary = target.with_suffix(f".{secrets.token_hex(4)}.tmp")
    with temporary.open("wb") as f:
        f.write(body)
        f.flush()
        os.fsync(f.fileno())
    try:
        os.link(temporary, target)
    except FileExistsError:
        try:
            verify(load(target))
        except CheckpointError:
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
