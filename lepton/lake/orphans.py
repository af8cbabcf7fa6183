"""Files that nobody needs: which of a table's files may go, and their going.

Every doubt keeps a file. What deltalake calls dead is a proposal only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import unquote

import pyarrow.fs as pafs
from deltalake import DeltaTable

from lepton.errors import LakeError
from lepton.lake.history import actions_of, commit_files, log_folder
from lepton.lake.log import load_version
from lepton.lake.paths import path_of
from lepton.lake.snapshot import Snapshot
from lepton.lake.storage import store_of
from lepton.lake.vectors import Vector, file_of, vector_of

_INTERVAL = re.compile(r"(?:interval\s+)?(\d+)\s+(minute|hour|day|week)s?", re.IGNORECASE)
_DEFAULT_HOURS = 168.0


def retention_of(opened: DeltaTable, pinned: Snapshot, asked: float | None) -> float:
    """Return the hours to keep replaced files: the table's, or more if asked.

    Raises:
        LakeError: less is asked, or what the table says is not understood.
    """
    text = opened.metadata().configuration.get("delta.deletedFileRetentionDuration")
    own = _DEFAULT_HOURS
    if text is not None:
        found = _INTERVAL.fullmatch(str(text).strip())
        if found is None:
            raise LakeError(
                f"table {pinned}: delta.deletedFileRetentionDuration is {text!r}; nothing was "
                "deleted: set it to something like 'interval 7 days'"
            )
        own = timedelta(**{f"{found[2].lower()}s": int(found[1])}).total_seconds() / 3600
    if asked is not None and asked < own:
        raise LakeError(
            f"retention_hours={asked} is shorter than the {own:g} hours that table {pinned} keeps "
            "replaced files for its readers; nothing was deleted: set the table's property "
            "delta.deletedFileRetentionDuration if no reader needs them"
        )
    return own if asked is None else asked


def needed_paths(pinned: Snapshot, protect: Collection[int]) -> set[str]:
    """Return the paths that the newest and the protected versions need, vectors included.

    Raises:
        LakeError: a protected version cannot be opened.
    """
    paths: set[str] = set()
    for number in sorted({pinned.version, *protect}):
        try:
            version = load_version(pinned.uri, number, pinned.options)
        except LakeError as e:
            raise LakeError(
                f"vacuum of table {pinned}: protected version {number} cannot be opened, so its "
                f"files are not known; nothing was deleted: leave it out of protect= ({e})"
            ) from e
        paths.update(path_below(pinned.uri, f.path) for f in version.files)
        paths.update(_vectors(pinned, (f.vector for f in version.files)))
    return paths


def _vectors(pinned: Snapshot, vectors: Iterable[Vector | None]) -> set[str]:
    """Paths of the files that hold deletion vectors."""
    try:
        files = {file_of(v) for v in vectors if v is not None}
    except ValueError as e:
        raise LakeError(
            f"vacuum of table {pinned}: the log names a deletion vector in no way that is known "
            f"({e}), so its file is not known; nothing was deleted"
        ) from e
    return {path_below(pinned.uri, f) for f in files if f is not None}


def path_below(uri: str, path: str) -> str:
    """Return a file's path relative to the table, however the log spells it; links are followed.

    Raises:
        LakeError: it has another kind of address than the table, so which file it is is a guess.
    """
    full = path_of(uri, path)
    if "://" in full:
        if not full.startswith(f"{uri}/"):  # such as s3a:// for s3://
            raise LakeError(
                f"table {uri!r} names the file {path!r} by another address than its own, so it is "
                "not known which files are needed; nothing was deleted: vacuum it by that address"
            )
        return full.removeprefix(f"{uri}/")
    return os.path.relpath(os.path.realpath(full), os.path.realpath(uri))


def recent_paths(pinned: Snapshot, cutoff: datetime) -> set[str]:
    """Return the paths that commits since the cutoff added, removed or wrote change data to."""
    options = dict(pinned.options)
    since = cutoff.timestamp() * 1000
    paths: set[str] = set()
    for number in reversed(commit_files(*log_folder(pinned.uri, options))):
        actions = actions_of(pinned.uri, number, options) or []
        stamps = [float(a.get("commitInfo", {}).get("timestamp", 0)) for a in actions]
        stamps += [float(a.get("remove", {}).get("deletionTimestamp") or 0) for a in actions]
        newest = max(stamps, default=0.0)
        if 0 < newest < since:
            break
        named = [n for a in actions if (n := a.get("add") or a.get("remove") or a.get("cdc"))]
        paths.update(path_below(pinned.uri, unquote(str(n["path"]))) for n in named)
        told = (n.get("deletionVector") for n in named)
        paths.update(_vectors(pinned, (vector_of(d) for d in told if d)))
    return paths


def storage_of(pinned: Snapshot) -> tuple[pafs.FileSystem, str]:
    """Return the file system that holds the table, and the table's path in it, slash included."""
    if "://" not in pinned.uri:
        return pafs.LocalFileSystem(), f"{pinned.uri}/"
    return store_of(pinned.uri, dict(pinned.options)), ""


def removable(
    filesystem: pafs.FileSystem,
    root: str,
    dead: Sequence[str],
    needed: Collection[str],
    cutoff: datetime,
) -> dict[str, int]:
    """Return the dead files that are there, old and not needed, with their sizes in bytes."""
    found: Any = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    there = {str(f.path).removeprefix(root): f for f in found if f.type == pafs.FileType.File}
    kept: dict[str, int] = {}
    for path in sorted(set(dead) | {unquote(p) for p in dead}):
        info = there.get(path)
        if info is None or path in needed or unquote(path) in needed:
            continue
        if info.mtime is not None and info.mtime < cutoff:
            kept[path] = int(info.size)
    return kept


def delete(filesystem: pafs.FileSystem, root: str, pinned: Snapshot, paths: Sequence[str]) -> None:
    """Delete files below ``root``; one that is gone already is none to worry about.

    Raises:
        LakeError: a file cannot be deleted; the message says how many were.
    """
    for done, path in enumerate(paths):
        try:
            filesystem.delete_file(root + path)
        except FileNotFoundError:
            continue
        except OSError as e:
            raise LakeError(
                f"vacuum of table {pinned}: cannot delete {path!r} ({done} of {len(paths)} dead "
                f"files were deleted, no other): {e}; see to the permissions and call it again"
            ) from e
