"""One commit: adds files that are there and whole, once, or says who was first.

The check of an application transaction and the commit rest on the same table handle: Delta
compares a transaction only with commits newer than the handle.
"""

from __future__ import annotations

import contextlib
import random
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote

import pyarrow.fs as pafs
from deltalake import CommitProperties, DeltaTable, Schema, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, RemoveAction, create_table_with_add_actions

from lepton.errors import LakeError, WriteConflict
from lepton.lake.files import Written
from lepton.lake.history import OPERATION, actions_of, first_line
from lepton.lake.journal import gone, info_of, keep_short, named, once, publish, stamp
from lepton.lake.log import DataFile, load_version
from lepton.lake.rules import Rules, rules_of
from lepton.lake.spelling import plain, respelled_files
from lepton.lake.storage import TRIES, opened_table, passes, store_of, table_or_none

_MARK = "leptonCommit"
ATTEMPTS = 12  # each with deltalake's own 15 retries


def properties_of(
    txn: tuple[str, int] | None, mark: str | None = None, retries: int | None = None
) -> CommitProperties:
    """Return what a commit carries: an application transaction, a mark to know it again by."""
    return CommitProperties(
        max_commit_retries=retries,
        app_transactions=[Transaction(*txn)] if txn else None,
        custom_metadata={_MARK: mark} if mark else None,
    )


def removable(file: DataFile) -> bool:
    """Whether deltalake can be told to remove just this file.

    It names no deletion vector in what it removes, and spells odd paths in its own way.
    """
    return file.vector is None and file.spelled is None and plain(file.path)


def commit_changes(
    opened: DeltaTable,
    rules: Rules,
    added: Sequence[Written],
    removed: Sequence[DataFile],
    *,
    uri: str,
    options: Mapping[str, str] | None,
    operation: str,
    txn: tuple[str, int] | None,
    mark: str,
    data_change: bool = True,
) -> None:
    """Commit files that come and go as the version after the handle's, or not at all.

    deltalake does where it can say it, and lepton where it cannot: change data, and files that
    have deletion vectors or odd paths.

    Args:
        opened: the version that everything was worked out from.
        rules: of the table.
        added: files that are there, change data among them.
        removed: files that are live in that version.
        uri: the table.
        options: as deltalake takes them.
        operation: what the history calls it.
        txn: application transaction.
        mark: to know the commit by if its answer is lost.
        data_change: False where the rows stay the same.

    Raises:
        CommitFailedError: another commit came first, or the answer was lost.
    """
    if rules.own or any(w.feed for w in added) or not all(removable(f) for f in removed):
        info = {_MARK: mark, "readVersion": opened.version(), "isBlindAppend": False}
        info = stamp(uri, opened.version(), options) | info if rules.stamped else info
        told = [info_of(operation, info)]
        told += [once(*txn)] if txn else []
        told += [named(w, data_change=data_change) for w in added]
        told += [gone(f, data_change=data_change) for f in removed]
        publish(uri, opened.version() + 1, told, options)
        keep_short(uri, opened.version() + 1, options)
        return
    now = int(time.time() * 1000)
    taken = [RemoveAction(f.path, data_change, now) for f in removed]
    info = {_MARK: mark, OPERATION: operation, "isBlindAppend": False}
    opened.create_write_transaction(
        [*_actions(added, data_change), *taken],
        "append",
        opened.schema(),
        partition_by=list(rules.partition_columns),
        commit_properties=CommitProperties(
            max_commit_retries=0,  # then deltalake settles no conflicts
            app_transactions=[Transaction(*txn)] if txn else None,
            custom_metadata={**info, "readVersion": opened.version()},
        ),
    )


def landed(uri: str, since: int, until: int, mark: str, options: Mapping[str, str] | None) -> bool:
    """Whether a commit after ``since``, up to ``until``, has this mark.

    Where the answer to a commit is lost, deltalake tries again and takes its own for another's.
    """
    for number in range(since + 1, until + 1):
        for action in actions_of(uri, number, options) or ():
            if (action.get("commitInfo") or {}).get(_MARK) == mark:
                return True
    return False


def reached(opened: DeltaTable, txn: tuple[str, int] | None) -> bool:
    """Whether the application's version is in the table already, as far as this handle sees."""
    latest = opened.transaction_version(txn[0]) if txn else None
    return txn is not None and latest is not None and latest >= txn[1]


def verify(files: Sequence[Written], uri: str, options: Mapping[str, str] | None) -> None:
    """Raise LakeError unless every file is there with its size."""
    store = store_of(uri, options)
    infos = store.get_file_info([f.path for f in files]) if files else []
    for file, info in zip(files, infos, strict=True):
        if info.type != pafs.FileType.File or info.size != file.size:
            raise LakeError(
                f"data file {file.path} of {uri!r} has {info.size} bytes, not the {file.size} that "
                "were written; nothing was committed: write again"
            )


def discard(files: Sequence[Written], uri: str, options: Mapping[str, str] | None) -> None:
    """Remove files that no commit names; what cannot be removed stays as an orphan."""
    store = store_of(uri, options)
    for file in files:
        with contextlib.suppress(OSError):
            store.delete_file(file.path)


def sweep(job: str, uri: str, options: Mapping[str, str] | None) -> None:
    """Remove what a job wrote; what cannot be removed stays as an orphan."""
    store = store_of(uri, options)
    with contextlib.suppress(OSError):
        found: Any = store.get_file_info(pafs.FileSelector("", recursive=True))
        for one in found:
            if one.base_name.startswith(f"part-{job}"):
                with contextlib.suppress(OSError):
                    store.delete_file(one.path)


def create(
    uri: str,
    rules: Rules,
    files: Sequence[Written],
    txn: tuple[str, int] | None,
    options: Mapping[str, str] | None,
) -> bool:
    """Make a table of these files in its first commit; return False if another process was first.

    Raises:
        LakeError: it cannot be made.
    """
    verify(files, uri, options)
    stored = dict(options) if options else None
    once = CommitProperties(
        max_commit_retries=0, app_transactions=[Transaction(*txn)] if txn else None
    )
    for attempt in range(1, TRIES + 1):
        try:
            create_table_with_add_actions(
                uri,
                Schema.from_arrow(rules.schema),
                _actions(files),
                partition_by=list(rules.partition_columns),
                storage_options=stored,
                commit_properties=once,
            )
        except (DeltaError, OSError, ValueError) as e:
            made = table_or_none(uri, options)
            if made is not None:
                return _committed(made, files, uri)
            if attempt == TRIES or not passes(e):
                told = first_line(e)
                raise LakeError(
                    f"cannot make the table {uri!r}; nothing was committed: {told}"
                ) from e
        else:
            break
    return True


def commit_files(
    opened: DeltaTable,
    rules: Rules,
    files: Sequence[Written],
    *,
    uri: str,
    mode: str,
    txn: tuple[str, int] | None,
    options: Mapping[str, str] | None,
    schema: Schema | None = None,
    next_only: bool = False,
) -> bool:
    """Commit files to an open table; return False if ``txn`` was there already.

    Appends commute with everything but a change of the table's rules, so they are tried again,
    with jitter, for as long as that lasts. An overwrite may bring another ``schema``, and count as
    the ``next`` version ``only``.

    Raises:
        WriteConflict: another commit came first, and this one would not mean the same after it.
        LakeError: a file is missing or cut, or the commit failed otherwise.
    """
    verify(files, uri, options)
    failure: Exception | None = None
    own = rules.own or _odd(opened, mode, schema)
    for attempt in range(ATTEMPTS * (5 if own else 1)):  # deltalake has tries of its own
        if attempt:
            time.sleep(random.uniform(0, min(2.0, 0.02 * 2**attempt)))  # noqa: S311 (no secret)
            before, opened = opened.version(), opened_table(uri, options)
            there = _committed(opened, files, uri)
            if there or reached(opened, txn):  # what failed came after, such as Delta's checkpoint
                discard([] if there else files, uri, options)
                return there
            if not _goes(opened, rules, before, mode, uri):
                discard(files, uri, options)
                raise conflict(opened, before, uri) from failure
        try:
            if own:
                _commit_rows(opened, rules, files, mode=mode, txn=txn, uri=uri, options=options)
            else:
                opened.create_write_transaction(
                    _actions(files),
                    mode,
                    schema or opened.schema(),
                    partition_by=list(rules.partition_columns),
                    commit_properties=properties_of(txn, retries=0 if next_only else None),
                )
        except (DeltaError, OSError, ValueError) as e:
            failure = e
            if not isinstance(e, CommitFailedError) and _done(e, rules, files, uri, options):
                return True
        else:
            return True
    if failure is not None and not isinstance(failure, CommitFailedError):
        told = first_line(failure)  # for all we know the commit is still on its way: files stay
        raise LakeError(f"cannot commit to table {rules.what}: {told}") from failure
    discard(files, uri, options)
    raise conflict(opened, opened.version() - 1, uri) from failure


def _goes(opened: DeltaTable, rules: Rules, before: int, mode: str, uri: str) -> bool:
    """Whether files still mean the same after commits that came meanwhile."""
    try:
        same = replace(rules_of(opened, uri), what=rules.what) == rules
    except LakeError:
        return False  # what it asks by now nobody here does
    return same and (mode != "overwrite" or opened.version() == before)


def _odd(opened: DeltaTable, mode: str, schema: Schema | None) -> bool:
    """Whether files have to go that deltalake could not remove."""
    return mode == "overwrite" and schema is None and bool(respelled_files(opened))


def _commit_rows(
    opened: DeltaTable,
    rules: Rules,
    files: Sequence[Written],
    *,
    mode: str,
    txn: tuple[str, int] | None,
    uri: str,
    options: Mapping[str, str] | None,
) -> None:
    """Commit files as the next version in lepton's own hand, in place of all files or not."""
    pairs, removed = tuple(sorted((options or {}).items())), tuple[DataFile, ...]()
    if mode == "overwrite":
        removed = load_version(uri, opened.version(), pairs).files
    commit_changes(
        opened,
        replace(rules, own=True),
        files,
        removed,
        uri=uri,
        options=options,
        operation="WRITE",
        txn=txn,
        mark=uuid.uuid4().hex,
    )


def _done(
    failure: Exception,
    rules: Rules,
    files: Sequence[Written],
    uri: str,
    options: Mapping[str, str] | None,
) -> bool:
    """Whether a commit that failed is there after all; a failure that stays is raised."""
    if _committed(opened_table(uri, options), files, uri):
        return True
    if not passes(failure):
        raise LakeError(
            f"cannot commit to table {rules.what}; nothing was written: {first_line(failure)}"
        ) from failure
    return False


def conflict(newest: DeltaTable, since: int, uri: str) -> WriteConflict:
    """Return the error that names the commit that came first."""
    told = "another commit"
    with contextlib.suppress(DeltaError, OSError, ValueError, KeyError):
        entries: list[Any] = list(newest.history(50))
        later = [e for e in entries if e.get("version", 0) > since]
        if later:
            first = min(later, key=lambda e: e["version"])
            at = datetime.fromtimestamp(first["timestamp"] / 1000, UTC).isoformat()
            told = f"commit {first['version']} ({first.get('operation', 'unknown')}, {at})"
    return WriteConflict(
        f"{told} changed table {uri!r}@{since} meanwhile; nothing was written: read it again and "
        "retry"
    )


def _committed(opened: DeltaTable, files: Sequence[Written], uri: str) -> bool:
    if not files:
        return False
    return any(unquote(u).endswith(files[0].path) for u in opened.file_uris())


def _actions(files: Sequence[Written], data_change: bool = True) -> list[Any]:
    return [
        AddAction(f.path, f.size, f.partition, f.modified_ms, data_change, f.statistics)
        for f in files
    ]
