"""Checkpoints on an object store (S3 and its like), by obstore.

The manifest is put with ``If-None-Match: *``, so of two writers one wins, and an answer that is
lost does no harm: what is there already is read and taken. Readers work on local copies, each kept
under its hash and compared with it whenever it is used.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from lepton.checkpoints.storage import damaged, measured, missing
from lepton.errors import CheckpointError
from lepton.lake.connection import connection

T = TypeVar("T")

COPIES_DAYS = 7
"""How long a local copy stays that nobody uses."""


class Bucket:
    """A prefix of an object store's bucket.

    Args:
        where: such as ``s3://bucket/prefix``.
        options: see :func:`lepton.checkpoints.storage.storage_of`.

    Raises:
        CheckpointError: obstore is not installed, or the options or the URL mean nothing to it.
    """

    def __init__(self, where: str, options: Mapping[str, str] | None = None) -> None:
        self.where = where.rstrip("/")
        try:
            self._obstore: Any = import_module("obstore")
        except ImportError as e:
            raise CheckpointError(
                f"checkpoints on {where} need obstore: pip install 'lepton[s3]'"
            ) from e
        try:
            self._store: Any = connection(self.where, options or {})
        except Exception as e:  # obstore has one class for each trouble
            raise CheckpointError(f"cannot reach checkpoints on {where}: {_first_line(e)}") from e

    def manifests(self) -> list[str]:
        """Return the names of all manifests, in order."""
        found: Any = self._do(self._obstore.list_with_delimiter, self._store)
        names = [str(o["path"]) for o in found["objects"]]
        return sorted(n for n in names if n.startswith("step-") and n.endswith(".json"))

    def folders(self) -> list[str]:
        """Return the names of all data folders, committed or not."""
        found: Any = self._do(self._obstore.list_with_delimiter, self._store, "data")
        return [str(p).rstrip("/") for p in found["common_prefixes"]]

    def read(self, name: str) -> bytes:
        """Return an object's content."""
        return bytes(self._do(lambda: self._obstore.get(self._store, name).bytes()))

    def path(self, name: str, expected: Mapping[str, Any]) -> Path:
        """Return a local copy that matches its hash, made if it is not there yet.

        Raises:
            CheckpointError: the object is missing or damaged.
        """
        folder = _copies() / str(expected["sha256"])
        copy = folder / name.rpartition("/")[2]
        if copy.is_file() and measured(copy)["sha256"] == expected["sha256"]:
            with suppress(OSError):  # somebody else's
                os.utime(folder)
            return copy
        folder.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(f".{secrets.token_hex(4)}{copy.suffix}")
        try:
            self._download(name, partial)
            if measured(partial)["sha256"] != expected["sha256"]:
                raise damaged(self.where, name)
            partial.replace(copy)
        except FileNotFoundError as e:
            raise missing(self.where, name) from e
        finally:
            partial.unlink(missing_ok=True)
        _forget_old()
        return copy

    def _download(self, name: str, target: Path) -> None:
        def fetch() -> None:
            with target.open("wb") as f:
                for chunk in self._obstore.get(self._store, name).stream():
                    f.write(chunk)

        self._do(fetch)

    def check(self, name: str, expected: Mapping[str, Any], *, thorough: bool) -> None:
        """Compare an object with its hash, by a local copy, or with its size."""
        if thorough:
            self.path(name, expected)
            return
        try:
            found: Any = self._do(self._obstore.head, self._store, name)
        except FileNotFoundError as e:
            raise missing(self.where, name) from e
        if int(found["size"]) != expected["bytes"]:
            raise damaged(self.where, name)

    @contextmanager
    def staged(self, folder: str) -> Generator[Path]:
        """Give a local folder, whose files are put on the store after the block."""
        with tempfile.TemporaryDirectory(prefix="lepton-checkpoint-") as scratch:
            yield Path(scratch)
            for path in sorted(Path(scratch).iterdir()):
                self._do(self._obstore.put, self._store, f"{folder}/{path.name}", path)

    def create(self, name: str, body: bytes) -> bool:
        """Put an object unless there is one by that name."""
        try:
            self._do(lambda: self._obstore.put(self._store, name, body, mode="create"))
        except FileExistsError:
            return False
        return True

    def replace(self, name: str, body: bytes) -> None:
        """Put an object, whatever was there."""
        self._do(self._obstore.put, self._store, name, body)

    def remove(self, name: str) -> None:
        """Remove an object."""
        with suppress(FileNotFoundError):
            self._do(self._obstore.delete, self._store, name)

    def remove_folder(self, folder: str) -> None:
        """Remove all objects below a folder."""
        for batch in self._do(lambda: list(self._obstore.list(self._store, folder))):
            with suppress(FileNotFoundError):
                self._do(self._obstore.delete, self._store, [o["path"] for o in batch])

    def _do(self, call: Callable[..., T], *arguments: Any) -> T:
        """Ask the store; what it refuses is an OSError."""
        errors = self._obstore.exceptions
        try:
            return call(*arguments)
        except errors.AlreadyExistsError as e:
            raise FileExistsError(_first_line(e)) from e
        except errors.NotFoundError as e:
            raise FileNotFoundError(_first_line(e)) from e
        except errors.BaseError as e:
            raise OSError(_first_line(e)) from e


def _first_line(error: Exception) -> str:
    """What obstore says, without its debugging text."""
    return str(error).partition("\n")[0]


def _copies() -> Path:
    """Where local copies are: below the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lepton" / "checkpoints"


def _forget_old() -> None:
    """Remove copies that nobody used for some days."""
    limit = time.time() - COPIES_DAYS * 86_400
    for folder in _copies().iterdir():
        with suppress(OSError):  # another process does the same
            if folder.stat().st_mtime < limit:
                shutil.rmtree(folder, ignore_errors=True)
