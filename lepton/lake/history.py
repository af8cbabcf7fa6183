"""The commits of a table: when, what, by which parameters."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow.fs as pafs

from lepton.errors import LakeError
from lepton.lake.storage import store_of

_COMMIT = re.compile(r"(\d{20})\.json")
OPERATION = "leptonOperation"
"""Commit info by which a commit is known where deltalake can only call it a write."""

_SAID = 600  # characters of an error that are worth telling
_CHECKPOINT = re.compile(
    r"(\d{20})\.checkpoint(?:\.(\d{10})\.(\d{10})|\.[0-9a-f-]{36})?\.(parquet|json)"
)
_HINT = "_last_checkpoint"


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
    return store_of(uri, options), "_delta_log"


def commit_files(filesystem: pafs.FileSystem, root: str) -> list[int]:
    """Return the versions whose commit file is there, ascending."""
    return sorted(int(m[1]) for n in names_of(filesystem, root) if (m := _COMMIT.fullmatch(n)))


def refuse_gaps(uri: str, version: int, options: Mapping[str, str] | None) -> None:
    """Refuse a version whose commits since its last checkpoint are not all there.

    deltalake replays what it finds, and would leave out a lost commit's rows in silence.

    Raises:
        LakeError: a commit file is missing.
    """
    files = infos_of(*log_folder(uri, options))
    names = [str(f.base_name) for f in files]
    sizes = {int(m[1]): f.size for f in files if (m := _COMMIT.fullmatch(str(f.base_name)))}
    needed = range(newest_point(names, version)[0] + 1, version + 1)
    lost = [n for n in needed if not sizes.get(n)]
    if lost:
        how = "is empty: its writer was cut off" if lost[0] in sizes else "is missing"
        raise LakeError(
            f"the log of table {uri!r}@{version} has a gap: {lost[0]:020}.json {how}"
            f"{f' (and {len(lost) - 1} more)' if len(lost) > 1 else ''}; put the file back, or "
            "read a version before it"
        )


def newest_point(names: Sequence[str], number: int) -> tuple[int, list[str]]:
    """Return the newest whole checkpoint up to a version: its version and files; -1 without one."""
    parts: dict[tuple[int, int], list[str]] = {}
    for name in sorted(names):
        m = _CHECKPOINT.fullmatch(name)
        if m and int(m[1]) <= number:
            count = int(m[3]) if m[3] else 1
            held = parts.setdefault((int(m[1]), count), [])
            if len(held) < count:
                held.append(name)
    whole = {version: held for (version, count), held in parts.items() if len(held) == count}
    newest = max(whole, default=-1)
    return newest, whole.get(newest, [])


def oldest_version(uri: str, options: Mapping[str, str] | None) -> int | None:
    """Return the oldest version that a log still tells; None where it tells none."""
    names = names_of(*log_folder(uri, options))
    if f"{0:020}.json" in names:
        return 0
    points = {int(m[1]) for n in names if (m := _CHECKPOINT.fullmatch(n))}
    return min((p for p in points if newest_point(names, p)[0] == p), default=None)


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
    if not names:
        return "there is no log in it: check the path and the storage options"
    refuse_gaps(uri, newest, options)
    for number in range(newest_point(names, newest)[0] + 1, newest + 1):
        try:
            actions_of(uri, number, options)
        except ValueError as e:
            return f"{number:020}.json of {uri!r}@{newest} is damaged ({e}): put the file back"
    points = sorted(n for n in names if _CHECKPOINT.fullmatch(n))
    if not points and _HINT in names:
        return (
            f"{_HINT} of {uri!r}@{newest} names a checkpoint that is not there: remove that file, "
            "it is a hint that readers can do without"
        )
    if not points:
        return f"see whether all files in _delta_log of {uri!r}@{newest} are whole"
    return (
        f"the newest checkpoint of {uri!r}@{newest} is {points[-1]}: if that file is cut off, "
        "restore it, or remove it if all commit files from 0 are still there"
    )


def names_of(filesystem: pafs.FileSystem, root: str) -> list[str]:
    """Return the names of the files in a log's folder; none where there is no such folder."""
    return [str(f.base_name) for f in infos_of(filesystem, root)]


def infos_of(filesystem: pafs.FileSystem, root: str) -> list[Any]:
    """Return name, size and time of the files in a log's folder."""
    found: Any = filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True))
    return list(found)


def first_line(error: BaseException) -> str:
    """Return what an error says without the trace that deltalake's may have below it, cut short."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text if len(text) <= _SAID else f"{text[:_SAID]}..."


def _info(filesystem: pafs.FileSystem, root: str, version: int) -> dict[str, Any]:
    with filesystem.open_input_stream(f"{root}/{version:020}.json") as source:
        for line in source.read().splitlines():
            if b"commitInfo" in line and (info := json.loads(line).get("commitInfo")):
                return dict(info)
    return {}


def _commit(version: int, entry: dict[str, Any]) -> Commit:
    stamp = entry.pop("timestamp", None)
    operation = entry.pop("operation", None)
    return Commit(
        version=version,
        time=None if stamp is None else datetime.fromtimestamp(int(stamp) / 1000, UTC),
        operation=str(entry.pop(OPERATION, None) or operation or ""),
        parameters=entry.pop("operationParameters", None) or {},
        metadata=entry,
    )
