"""Where a run's checkpoints lie: a folder that all nodes see, or an object store.

Both give what a commit needs: data files first, then a manifest that is created only if its name is
free. Names are relative, with slashes.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from lepton.errors import CheckpointError


class Storage(Protocol):
    """What holds checkpoints.

    Raises:
        OSError: from any of its methods, when the storage refuses or cannot be reached.
    """

    where: str

    def manifests(self) -> list[str]:
        """Return the names of all manifests, in order."""
        ...

    def folders(self) -> list[str]:
        """Return the names of all data folders, committed or not."""
        ...

    def read(self, name: str) -> bytes:
        """Return a small file's content; FileNotFoundError if there is none."""
        ...

    def path(self, name: str, expected: Mapping[str, Any]) -> Path:
        """Return a path under which a data file can be opened."""
        ...

    def check(self, name: str, expected: Mapping[str, Any], *, thorough: bool) -> None:
        """Raise CheckpointError unless a data file is there and is the expected one.

        Args:
            name: of the file.
            expected: its ``sha256`` and ``bytes``.
            thorough: read it; otherwise its size may be enough where reading means a download.
        """
        ...

    def staged(self, folder: str) -> AbstractContextManager[Path]:
        """Return a folder to write data files into; they are in the storage after the block."""
        ...

    def create(self, name: str, body: bytes) -> bool:
        """Write a small file at once, unless there is one by that name: then return False."""
        ...

    def replace(self, name: str, body: bytes) -> None:
        """Write a small file at once, whatever was there."""
        ...

    def remove(self, name: str) -> None:
        """Remove a small file, if it is there."""
        ...

    def remove_folder(self, folder: str) -> None:
        """Remove a data folder as far as it can be."""
        ...


class Folder:
    """A folder of the file system."""

    def __init__(self, where: str) -> None:
        self.where = where
        self._root = Path(where)

    def manifests(self) -> list[str]:
        """Return the names of all manifests, in order."""
        return sorted(p.name for p in self._root.glob("step-*.json"))

    def folders(self) -> list[str]:
        """Return the names of all data folders, committed or not."""
        return [f"data/{p.name}" for p in self._root.glob("data/*")]

    def read(self, name: str) -> bytes:
        """Return a file's content."""
        return (self._root / name).read_bytes()

    def path(self, name: str, expected: Mapping[str, Any]) -> Path:
        """Return the file's own path."""
        return self._root / name

    def check(self, name: str, expected: Mapping[str, Any], *, thorough: bool) -> None:
        """Compare a data file with its hash."""
        path = self._root / name
        if not path.is_file():
            raise missing(self.where, name)
        if measured(path)["sha256"] != expected["sha256"]:
            raise damaged(self.where, name)

    @contextmanager
    def staged(self, folder: str) -> Generator[Path]:
        """Give the folder itself; without a manifest nobody sees it."""
        (self._root / folder).mkdir(parents=True, exist_ok=True)
        yield self._root / folder

    def create(self, name: str, body: bytes) -> bool:
        """Put a file in place by a link, which fails if the name is taken."""
        temporary = self._temporary(name, body)
        try:
            os.link(temporary, self._root / name)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def replace(self, name: str, body: bytes) -> None:
        """Put a file in place of another."""
        self._temporary(name, body).replace(self._root / name)

    def _temporary(self, name: str, body: bytes) -> Path:
        temporary = (self._root / name).with_suffix(f".{secrets.token_hex(4)}.tmp")
        with temporary.open("wb") as f:
            f.write(body)
            f.flush()
            os.fsync(f.fileno())
        return temporary

    def remove(self, name: str) -> None:
        """Remove a file."""
        (self._root / name).unlink(missing_ok=True)

    def remove_folder(self, folder: str) -> None:
        """Remove a data folder."""
        shutil.rmtree(self._root / folder, ignore_errors=True)


def storage_of(where: str | os.PathLike[str], options: Mapping[str, str] | None = None) -> Storage:
    """Return the storage at a path or a URL.

    Args:
        where: the folder; ``s3://bucket/prefix`` and the like for an object store.
        options: credentials and endpoints of an object store, as tables take them; they win over
            the environment.

    Raises:
        CheckpointError: the URL is of no known kind, or what it needs is not installed.
    """
    place = os.fspath(where)
    if "://" not in place:
        return Folder(place)
    from lepton.checkpoints.bucket import Bucket

    return Bucket(place, options)


def measured(path: Path) -> dict[str, Any]:
    """Return a file's hash and size, as a manifest has them."""
    with path.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size}


def missing(where: str, name: str) -> CheckpointError:
    """Say that a data file is not there."""
    return CheckpointError(f"checkpoint file {where}/{name} is missing: use an earlier checkpoint")


def damaged(where: str, name: str) -> CheckpointError:
    """Say that a data file is not what its manifest vouches for."""
    return CheckpointError(
        f"checkpoint file {where}/{name} does not match its hash; it is damaged, use an earlier "
        "checkpoint"
    )


@contextmanager
def swept(storage: Storage, folder: str) -> Generator[None]:
    """Remove a data folder if the block fails."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            storage.remove_folder(folder)
        raise
