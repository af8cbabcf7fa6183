"""The manifest: what a checkpoint vouches for, and its commit point."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lepton.checkpoints.storage import Storage, storage_of
from lepton.errors import CheckpointError

VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a checkpoint vouches for.

    Attributes:
        uri: address of the manifest itself: a path, or a URL of an object store.
        step: optimiser steps made.
        cursor: where the stream stands, from ``state_dict()``.
        files: file name to ``{"sha256", "bytes"}``; one that other checkpoints share has its
            folder in ``"in"``.
        folder: data folder, relative to the manifest's.
        lineage: table uri and version, columns, filter, seed, batch size, lanes, code version, …
        preparation: JSON of the preparation, or None.
        signature: inputs and outputs of the exported program, or None.
        program_error: why the net could not be exported, if it could not.
        metrics: figures known at that step.
        traceparent: the span under which it was written.
        options: how its storage is reached; never written down.
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
    options: Mapping[str, str] = field(default_factory=dict[str, str], repr=False, compare=False)

    @property
    def storage(self) -> Storage:
        """Where it lies."""
        return storage_of(self.uri.rpartition("/")[0], self.options)

    @property
    def name(self) -> str:
        """The manifest's file name."""
        return self.uri.rpartition("/")[2]

    @property
    def sha256(self) -> str:
        """Hash of the manifest file: the checkpoint's identity."""
        return hashlib.sha256(self.storage.read(self.name)).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all data files."""
        return sum(int(f["bytes"]) for f in self.files.values())

    @property
    def own_size(self) -> int:
        """Bytes of the data files that no other checkpoint shares."""
        return sum(int(f["bytes"]) for f in self.files.values() if "in" not in f)

    @property
    def folders(self) -> set[str]:
        """All data folders that it needs."""
        return {self.folder, *(str(f["in"]) for f in self.files.values() if "in" in f)}

    def place(self, name: str) -> str:
        """Return where a data file is, relative to the manifest's folder."""
        return f"{self.files[name].get('in', self.folder)}/{name}"

    def path(self, name: str) -> Path:
        """Return the path of a data file: of the file itself, or of a local copy that matches.

        Raises:
            CheckpointError: the checkpoint has no such file, or it cannot be had.
        """
        if name not in self.files:
            raise CheckpointError(f"checkpoint {self.uri} has no {name}; it has {list(self.files)}")
        return self.storage.path(self.place(name), self.files[name])

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        left_out = ("uri", "options")
        body = {"v": VERSION, **{k: v for k, v in asdict(self).items() if k not in left_out}}
        return json.dumps(body, indent=1).encode()


def parsed(body: bytes, uri: str, options: Mapping[str, str] | None = None) -> Manifest:
    """Return the manifest that a file's content holds.

    Raises:
        CheckpointError: it is not one, or not one that this lepton reads.
    """
    try:
        found = json.loads(body)
        if found.pop("v") != VERSION:
            raise CheckpointError(f"checkpoint {uri} was written by another lepton: use that one")
        return Manifest(uri=uri, options=dict(options or {}), **found)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{uri} is not a lepton checkpoint manifest: {e}") from e
