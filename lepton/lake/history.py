"""The commits of a table: when, what, by which parameters."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow.fs as pafs

from lepton.errors import LakeError

_COMMIT = re.compile(r"(\d{20})\.json")
_COMPACTED = re.compile(r"(\d{20})\.(\d{20})\.compacted\.json")
_CHECKPOINT = re.compile(r"(\d{20})\.checkpoint\..*(?:parquet|json)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """One commit.

    Attributes:
        version: the version it made.
        time: when, in UTC, as its writer says; None where it does not.
        operation: for example ``WRITE`` or ``MERGE``; empty where the writer does not say.
        parameters: the operation's parameters, as written.
        metadata: everything else in the commit info: the user's own metadata among it.
    """

    version: int
    time: datetime | None
    operation: str
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])


def history_of(uri: str, version: int, options: Mapping[str, str] | None) -> list[Commit]:
    """Return the commits up to a version, newest first; vacuumed logs have fewer.

    Raises:
        LakeError: the log cannot be read.
    """
    filesystem, root = log_folder(uri, options)
    commits = [n for n in commit_files(filesystem, root) if n <= version]
    try:
        return [_commit(n, _info(filesystem, root, n)) for n in reversed(commits)]
    except (OSError, ValueError) as e:
        raise LakeError(f"cannot read the history of {uri!r}@{version}: {e}") from e


def log_folder(uri: str, options: Mapping[str, str] | None) -> tuple[pafs.FileSystem, str]:
    """Return the file system and the path in it of a table's log."""
    if "://" not in uri:
        return pafs.LocalFileSystem(), f"{uri}/_delta_log"
    from deltalake.fs import DeltaStorageHandler

    handler: Any = DeltaStorageHandler(uri, dict(options) if options else None)
    return pafs.PyFileSystem(handler), "_delta_log"


def commit_files(filesystem: pafs.FileSystem, root: str) -> list[int]:
    """Return the versions whose commit file is there, ascending."""
    return sorted(int(m[1]) for n in names_of(filesystem, root) if (m := _COMMIT.fullmatch(n)))


def refuse_gaps(uri: str, version: int, options: Mapping[str, str] | None) -> None:
    """Refuse a version whose commits since its last checkpoint are not all there.

    deltalake replays what it finds, and would leave out a lost commit's rows in silence.

    Raises:
        LakeError: a commit file is missing.
    """
    filesystem, root = log_folder(uri, options)
    names = names_of(filesystem, root)
    there = {int(m[1]) for n in names if (m := _COMMIT.fullmatch(n))}
    for name in names:
        if m := _COMPACTED.fullmatch(name):
            there |= set(range(int(m[1]), int(m[2]) + 1))
    points = [int(m[1]) for n in names if (m := _CHECKPOINT.fullmatch(n)) and int(m[1]) <= version]
    lost = sorted(set(range(max(points, default=-1) + 1, version + 1)) - there)
    if lost:
        raise LakeError(
            f"the log of table {uri!r}@{version} has a gap: {lost[0]:020}.json is missing"
            f"{f' (and {len(lost) - 1} more)' if len(lost) > 1 else ''}; put the file back, or "
            "read a version before it"
        )


def actions_of(
    uri: str, version: int, options: Mapping[str, str] | None
) -> list[dict[str, Any]] | None:
    """Return the actions of one commit, or None where its file is gone."""
    filesystem, root = log_folder(uri, options)
    try:
        with filesystem.open_input_stream(f"{root}/{version:020}.json") as source:
            return [json.loads(line) for line in source.read().splitlines() if line.strip()]
    except FileNotFoundError:
        return None


def explain_damage(uri: str, options: Mapping[str, str] | None) -> str:
    """Return what to look at in a log that deltalake could not replay.

    Raises:
        LakeError: a commit file is missing: that is why.
    """
    filesystem, root = log_folder(uri, options)
    try:
        names = names_of(filesystem, root)
    except OSError:
        return "check the path and the storage options"
    newest = max((int(m[1]) for n in names if (m := _COMMIT.fullmatch(n))), default=-1)
    refuse_gaps(uri, newest, options)
    points = sorted(n for n in names if _CHECKPOINT.fullmatch(n))
    if not points:
        return f"the newest commit is {newest}: see whether the files in _delta_log are whole"
    return (
        f"the newest commit is {newest} and the newest checkpoint {points[-1]}: if that file is "
        "cut off, "
        "restore it, or remove it if all commit files from 0 are still there"
    )


def names_of(filesystem: pafs.FileSystem, root: str) -> list[str]:
    """Return the names of the files in a log's folder; none where there is no such folder."""
    found: Any = filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True))
    return [str(f.base_name) for f in found]


def _info(filesystem: pafs.FileSystem, root: str, version: int) -> dict[str, Any]:
    with filesystem.open_input_stream(f"{root}/{version:020}.json") as source:
        for line in source.read().splitlines():
            if b"commitInfo" in line and (info := json.loads(line).get("commitInfo")):
                return dict(info)
    return {}


def _commit(version: int, entry: dict[str, Any]) -> Commit:
    stamp = entry.pop("timestamp", None)
    return Commit(
        version=version,
        time=None if stamp is None else datetime.fromtimestamp(int(stamp) / 1000, UTC),
        operation=str(entry.pop("operation", None) or ""),
        parameters=entry.pop("operationParameters", None) or {},
        metadata=entry,
    )
