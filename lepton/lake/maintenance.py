"""Looking after a table: fewer and sorted files, no dead files, a quick log, a way back.

Nothing here changes a row, except :func:`restore`, which puts an older version's rows back. Each
call is one span, says what it did as a :class:`Upkeep`, and can say it beforehand (``dry_run``).
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError

from lepton import telemetry
from lepton.errors import LakeError
from lepton.lake.compaction import commit_anew
from lepton.lake.history import first_line
from lepton.lake.log import DataFile, Version, open_table
from lepton.lake.orphans import (
    delete,
    needed_paths,
    recent_paths,
    removable,
    retention_of,
    storage_of,
)
from lepton.lake.predicate import near_names
from lepton.lake.rules import rules_of
from lepton.lake.snapshot import Snapshot, table
from lepton.lake.spelling import refuse_respelled
from lepton.telemetry import Carrier

TARGET_BYTES = 100 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Upkeep:
    """What a call did, or with ``dry_run`` would do.

    Attributes:
        uri: the table.
        before: its version when the call began.
        version: its version afterwards; equal where nothing was committed.
        removed: paths of files that left: the disk for a vacuum, else the newest version.
        added: paths of files that the newest version gained.
        removed_bytes: size of ``removed`` together.
        added_bytes: size of ``added`` together.
        protected: versions whose files a vacuum kept.
        dry_run: nothing was changed.
    """

    uri: str
    before: int
    version: int
    removed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    removed_bytes: int = 0
    added_bytes: int = 0
    protected: tuple[int, ...] = ()
    dry_run: bool = False


def optimize(
    uri: str | os.PathLike[str],
    *,
    zorder: Sequence[str] | None = None,
    partition: Mapping[str, Any] | None = None,
    target_bytes: int = TARGET_BYTES,
    dry_run: bool = False,
    storage_options: Mapping[str, str] | None = None,
    trace: Carrier | None = None,
) -> Upkeep:
    """Rewrite small files as fewer large ones, in one commit; older versions stay as they were.

    All files that it writes have page checksums and complete statistics.

    Args:
        uri: the table.
        zorder: sort by these columns along a Z curve, so that filters on them skip more files;
            rewrites every file. Without it rows keep their order.
        partition: rewrite only files with these partition values.
        target_bytes: size of a file to aim for; smaller files are candidates.
        dry_run: only list the candidates; fewer of them may be rewritten.
        storage_options: as deltalake takes them.
        trace: where the call was asked from.

    Raises:
        ValueError: ``target_bytes`` is not positive.
        LakeError: a column is not there, or the commit failed; the table is as it was.
    """
    if target_bytes <= 0:
        raise ValueError(f"target_bytes must be positive, not {target_bytes}")
    with _span("lepton.optimize", trace, dry_run) as span:
        pinned = table(uri, storage_options=storage_options)
        before = pinned.load()
        _check_columns(pinned, zorder or (), before.schema.names, "column")
        _check_columns(pinned, partition or (), before.partition_columns, "partition column")
        if dry_run:
            chosen = _candidates(before, partition or {}, None if zorder else target_bytes)
            return _told(span, _diff(before, before, chosen))
        if zorder:
            groups = _groups(before, partition or {}, None)
        else:
            groups = _bins(before, partition or {}, target_bytes)
        with _explained("optimize", pinned):
            opened = _opened(pinned)
            curve = (tuple(zorder), target_bytes) if zorder else None
            if groups and not commit_anew(
                opened,
                rules_of(opened, pinned.uri, same_rows=True),
                before,
                groups,
                options=dict(pinned.options),
                curve=curve,
            ):
                raise CommitFailedError("another commit came first")
        return _told(span, _diff(before, _newest(pinned)))


def vacuum(
    uri: str | os.PathLike[str],
    *,
    retention_hours: float | None = None,
    protect: Collection[int] = (),
    dry_run: bool = True,
    storage_options: Mapping[str, str] | None = None,
    trace: Carrier | None = None,
) -> Upkeep:
    """Delete files that no version within the retention and no protected version needs.

    Among them are orphans: files that no commit names, left by writers that were killed or lost a
    race. A file goes only if deltalake calls it dead, it is older than the retention (so that a
    write under way, which may take as long, keeps its files), and neither the newest nor a
    protected version nor a commit within the retention names it. The same holds for deletion
    vectors, of which deltalake alone takes the live ones for dead, and for change data.

    Args:
        uri: the table.
        retention_hours: hours that a replaced file stays; default the table's own retention,
            one week if it has none. Not less than that.
        protect: versions to keep readable; see ``lepton.registry.protection``.
        dry_run: only list the files. The default: deleting cannot be undone.
        storage_options: as deltalake takes them.
        trace: where the call was asked from.

    Raises:
        LakeError: the retention is too short, or a protected version cannot be opened (nothing
            was deleted), or a file cannot be deleted (the message says how many were).
    """
    with _span("lepton.vacuum", trace, dry_run) as span:
        pinned = table(uri, storage_options=storage_options)
        opened = _opened(pinned)
        hours = retention_of(opened, pinned, retention_hours)
        cutoff = datetime.now(UTC) - timedelta(hours=hours)
        needed = needed_paths(pinned, protect) | recent_paths(pinned, cutoff)
        with _explained("list the dead files of", pinned):
            dead = opened.vacuum(
                math.ceil(hours), dry_run=True, enforce_retention_duration=False, full=True
            )
            filesystem, root = storage_of(pinned)
            removed = removable(filesystem, root, dead, needed, cutoff)
        if not dry_run:
            delete(filesystem, root, pinned, list(removed))
        return _told(
            span,
            Upkeep(
                uri=pinned.uri,
                before=pinned.version,
                version=pinned.version,
                removed=tuple(removed),
                removed_bytes=sum(removed.values()),
                protected=tuple(sorted(set(protect))),
                dry_run=dry_run,
            ),
        )


def checkpoint(
    uri: str | os.PathLike[str],
    *,
    dry_run: bool = False,
    storage_options: Mapping[str, str] | None = None,
    trace: Carrier | None = None,
) -> Upkeep:
    """Write a checkpoint of the newest version: readers then need no older commit.

    Raises:
        LakeError: it could not be written; the table is as it was.
    """
    with _span("lepton.checkpoint_table", trace, dry_run) as span:
        pinned = table(uri, storage_options=storage_options)
        if not dry_run:
            with _explained("write a checkpoint of", pinned):
                _opened(pinned).create_checkpoint()
        n = pinned.version
        return _told(span, Upkeep(uri=pinned.uri, before=n, version=n, dry_run=dry_run))


def restore(
    uri: str | os.PathLike[str],
    version: int,
    *,
    dry_run: bool = False,
    storage_options: Mapping[str, str] | None = None,
    trace: Carrier | None = None,
) -> Upkeep:
    """Make an older version's rows the newest again, in a new commit; nothing is forgotten.

    Raises:
        LakeError: there is no such version, files of it are gone, or the commit failed; the
            table is as it was.
    """
    with _span("lepton.restore", trace, dry_run) as span:
        pinned = table(uri, storage_options=storage_options)
        wanted = table(uri, version=version, storage_options=storage_options)
        before = pinned.load()
        if dry_run or version == pinned.version:
            change = _diff(before, wanted.load())
            return _told(span, replace(change, version=pinned.version, dry_run=dry_run))
        with _explained(f"restore version {version} of", pinned):
            opened = _opened(pinned)
            refuse_respelled(opened, str(pinned))
            opened.restore(version)
        return _told(span, _diff(before, _newest(pinned)))


@contextmanager
def _span(name: str, trace: Carrier | None, dry_run: bool) -> Generator[telemetry.Span]:
    attributes = {"lepton.dry_run": dry_run}
    with telemetry.span(name, trace or Carrier("", None), attributes=attributes) as span:
        yield span


def _told(span: telemetry.Span, done: Upkeep) -> Upkeep:
    span.set(
        lepton_table=done.uri,
        lepton_table_version=done.version,
        lepton_files_removed=len(done.removed),
        lepton_files_added=len(done.added),
        lepton_bytes_removed=done.removed_bytes,
        lepton_bytes_added=done.added_bytes,
    )
    return done


@contextmanager
def _explained(what: str, pinned: Snapshot) -> Generator[None]:
    try:
        yield
    except CommitFailedError as e:
        if "nsupported" in str(e):  # deltalake's way to say that it lacks a feature
            raise LakeError(f"cannot {what} table {pinned}: {first_line(e)}") from e
        raise LakeError(
            f"cannot {what} table {pinned}: another writer changed it meanwhile; nothing was "
            f"committed, so try again: {first_line(e)}"
        ) from e
    except (DeltaError, OSError, ValueError) as e:
        raise LakeError(
            f"cannot {what} table {pinned}: {first_line(e)}; the table is as it was: see whether "
            "its files are all there and whether deltalake can write its features"
        ) from e


def _opened(pinned: Snapshot) -> DeltaTable:
    return open_table(pinned.uri, pinned.version, dict(pinned.options))


def _newest(pinned: Snapshot) -> Version:
    return table(pinned.uri, storage_options=dict(pinned.options)).load()


def _check_columns(pinned: Snapshot, asked: Iterable[str], known: Sequence[str], kind: str) -> None:
    for name in asked:
        if name not in known:
            raise LakeError(
                f"table {pinned} has no {kind} {name}{near_names(name, known)}; it has: "
                f"{', '.join(known) or '(none)'}"
            )


def _diff(before: Version, after: Version, chosen: Sequence[str] | None = None) -> Upkeep:
    old, new = before.sizes(), after.sizes()
    removed = [p for p in old if p not in new] if chosen is None else list(chosen)
    added = [p for p in new if p not in old]
    return Upkeep(
        uri=before.uri,
        before=before.number,
        version=after.number,
        removed=tuple(removed),
        added=tuple(added),
        removed_bytes=sum(old[p] for p in removed),
        added_bytes=sum(new[p] for p in added),
        dry_run=chosen is not None,
    )


def _candidates(version: Version, partition: Mapping[str, Any], below: int | None) -> list[str]:
    """Files of the partition, and with a size limit those below it that have company."""
    groups = _groups(version, partition, below)
    return [f.path for files in groups if below is None or len(files) > 1 for f in files]


def _groups(
    version: Version, partition: Mapping[str, Any], below: int | None
) -> list[list[DataFile]]:
    sizes = version.sizes()
    groups: dict[tuple[Any, ...], list[DataFile]] = defaultdict(list)
    for file in version.files:
        same = all(str(file.partition.get(k)) == str(v) for k, v in partition.items())
        if same and (below is None or sizes[file.path] < below):
            groups[tuple(file.partition.get(c) for c in version.partition_columns)].append(file)
    return list(groups.values())


def _bins(version: Version, partition: Mapping[str, Any], target: int) -> list[list[DataFile]]:
    """Files to write as one, of about the target's bytes together."""
    sizes = version.sizes()
    bins: list[list[DataFile]] = []
    for files in _groups(version, partition, target):
        filled = target
        for file in files:
            if filled + sizes[file.path] > target:
                bins.append([])
                filled = 0
            bins[-1].append(file)
            filled += sizes[file.path]
    return [files for files in bins if len(files) > 1]
