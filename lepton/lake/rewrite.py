"""Merge, delete by key and replace_where: files with a row that changes are written anew.

The files are ours (page checksums, complete statistics) and take the others' places in one commit,
which counts only as the very next version: a merge that another commit came before is worked out
again for the files that it has not seen, a replacement would take away rows that it had not seen,
so there the other commit wins. Where the table keeps a change data feed, the same commit names
files that tell every change.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError

from lepton.errors import LakeError, WriteConflict
from lepton.lake.commit import (
    commit_changes,
    conflict,
    discard,
    landed,
    reached,
    sweep,
    verify,
)
from lepton.lake.files import Written
from lepton.lake.history import first_line
from lepton.lake.log import DataFile, Version
from lepton.lake.replacement import (
    Fetch,
    Ints,
    Target,
    candidates,
    inserted,
    matched,
    replaced,
    without,
)
from lepton.lake.rows import align
from lepton.lake.rules import Rules, rules_of
from lepton.lake.snapshot import Snapshot
from lepton.lake.storage import TRIES, opened_table, passes

ATTEMPTS = 60
GROUP_BYTES = 64 * 2**20  # of rows to insert that are worth a file

Operation = Literal["MERGE", "DELETE", "REPLACE"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The rows that change a table, aligned and checked, in blocks.

    Attributes:
        blocks: tables, or what ``fetch`` makes one of.
        rows: rows in each block.
        sizes: bytes of each block.
        keys: the key columns of all blocks, in order; None where nothing is merged.
        fetch: gets a block.
        run: calls a function with each of some argument lists and returns what it returned.
        job: what the names of new files begin with.
    """

    blocks: Sequence[Any]
    rows: Ints
    sizes: Sequence[int]
    keys: pa.Table | None
    fetch: Fetch
    run: Callable[[Callable[..., Any], list[tuple[Any, ...]]], list[Any]]
    job: str = field(default_factory=lambda: f"{uuid.uuid4().hex}-")


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What is to be done to a table.

    Attributes:
        operation: what the history calls it.
        where: the condition of the rows to replace, or None.
        txn: application transaction.
        uri: the table.
        options: as deltalake takes them.
    """

    operation: Operation
    where: str | None
    txn: tuple[str, int] | None
    uri: str
    options: Mapping[str, str] | None = field(repr=False)


def rewrite(opened: DeltaTable, rules: Rules, source: Source, change: Change) -> None:
    """Change a table by rows: all of it in one commit, or nothing.

    Raises:
        WriteConflict: other commits came first each time, or changed the table's rules.
        LakeError: a file cannot be read or written.
    """
    work = _Work(source, rules, change, opened.version())
    failure: Exception | None = None
    with work.tidied():
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(random.uniform(0, min(1.0, 0.02 * 2**attempt)))  # noqa: S311 (no secret)
                opened = _opened(change)
            failure = work.commit(opened)
            if failure is None or work.over(failure):
                return
            if not work.hopeful:
                break
        raise _unable(failure, rules, change, work.since) from failure


def _unable(failure: Exception | None, rules: Rules, change: Change, since: int) -> LakeError:
    """The error that says why a change came to nothing."""
    newest = _opened(change)
    if newest.version() > since:
        return conflict(newest, since, change.uri)
    told = "" if failure is None else first_line(failure)
    return LakeError(f"cannot commit to table {rules.what}; nothing was written: {told}")


def write_all(
    source: Source, rules: Rules, uri: str, options: Mapping[str, str] | None
) -> list[Written]:
    """Write all rows of a source as data files of a new table; on failure none is left."""
    change = Change(operation="MERGE", where=None, txn=None, uri=uri, options=options)
    version = Version(uri=uri, number=-1, fields=(), partition_columns=(), files=(), table_id="new")
    work = _Work(source, rules, change, -1)
    with work.tidied():
        work.insert(Target(version=version, rules=rules, options=options, job=source.job), [])
        work.committed = work.added  # by the caller
    return work.added


def written_wider(
    opened: DeltaTable, rules: Rules, uri: str, options: Mapping[str, str] | None
) -> list[Written]:
    """Write every row of a table anew for other rules; on failure no file is left."""
    pairs = tuple(sorted((options or {}).items()))
    version = Snapshot(uri=uri, version=opened.version(), options=pairs).load()
    target = Target(version=version.without_files(), rules=rules, options=options, job="")
    written: list[Written] = []
    try:
        for file in version.files:
            written += target.write(align(target.rows(file), rules.schema, fill=True))
    except BaseException:
        discard(written, uri, options)
        raise
    return written


def _opened(change: Change) -> DeltaTable:
    return opened_table(change.uri, change.options)


@dataclass(slots=True)
class _Work:
    """What was worked out so far: a file's part holds for as long as the file is live."""

    source: Source
    rules: Rules
    change: Change
    since: int
    found: dict[str, Ints | None] = field(default_factory=dict[str, "Ints | None"])
    replaced: dict[str, list[Written]] = field(default_factory=dict[str, "list[Written]"])
    added: list[Written] = field(default_factory=list["Written"])
    taken: bytes | None = None
    written: list[Written] = field(default_factory=list["Written"])
    newest: list[Written] = field(default_factory=list["Written"])
    committed: list[Written] = field(default_factory=list["Written"])
    sent: bool = False
    hopeful: bool = True
    troubles: int = 0
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def commit(self, opened: DeltaTable) -> Exception | None:
        """Try to commit as the next version; return why it failed, if it did."""
        change = self.change
        added, removed = self.files(opened)
        if not added and not removed and change.txn is None:
            return None
        verify(added, change.uri, change.options)
        self.sent = True
        try:
            commit_changes(
                opened,
                self.rules,
                added,
                removed,
                uri=change.uri,
                options=change.options,
                operation=change.operation,
                txn=change.txn,
                mark=self.mark,
            )
        except (DeltaError, OSError, ValueError) as e:
            return e
        self.committed = added
        return None

    def over(self, failure: Exception) -> bool:
        """Whether the change is there after a failed commit; else see whether to try again."""
        change, newest = self.change, _opened(self.change)
        ours = landed(change.uri, self.since, newest.version(), self.mark, change.options)
        self.sent, self.committed = False, self.newest if ours else []
        if ours or reached(newest, change.txn):
            return True  # by this process, whose answer was lost on the way, or by another one
        if replace(rules_of(newest, change.uri), what=self.rules.what) != self.rules:
            self.hopeful = False
        if change.where is not None and newest.version() > self.since:
            self.hopeful = False
        if not isinstance(failure, CommitFailedError):
            self.troubles += 1
            if self.troubles == TRIES or not passes(failure):
                self.hopeful, self.sent = False, True  # for all we know it is still on its way
        return False

    @contextmanager
    def tidied(self) -> Generator[None]:
        """Remove what was written and not committed; what may have been committed stays."""
        try:
            yield
        except BaseException as e:
            if not self.sent and not self.committed and not isinstance(e, WriteConflict):
                sweep(self.source.job, self.change.uri, self.change.options)
            raise
        finally:
            if not self.sent or self.committed:
                kept = {w.path for w in self.committed}
                left = [w for w in self.written if w.path not in kept]
                discard(left, self.change.uri, self.change.options)

    def files(self, opened: DeltaTable) -> tuple[list[Written], list[DataFile]]:
        """The files that come and those that go, for a version of the table."""
        options = tuple(sorted((self.change.options or {}).items()))
        view = Snapshot(uri=self.change.uri, version=opened.version(), options=options)
        version = view.load()
        target = Target(
            version=version.without_files(),
            rules=self.rules,
            options=self.change.options,
            job=self.source.job,
        )
        if self.change.where is None:
            touched = self._merged(target, version)
        else:
            touched = self._replacing(target, view.where(self.change.where))
        self.newest = [w for f in touched for w in self.replaced[f.path]] + self.added
        return self.newest, touched

    def _merged(self, target: Target, version: Version) -> list[DataFile]:
        source, keys = self.source, self.source.keys
        if keys is None or len(keys) == 0:
            return []
        files = candidates(version, keys)
        new = [f for f in files if f.path not in self.found]
        shared = source.run(matched, [(target, f, keys) for f in new])
        self.found |= {f.path: m for f, m in zip(new, shared, strict=True)}
        touched = [f for f in files if self.found[f.path] is not None]
        starts = np.concatenate([[0], np.cumsum(source.rows)])[:-1].astype(np.int64)
        blocks = None if self.change.operation == "DELETE" else source.blocks
        new = [f for f in touched if f.path not in self.replaced]
        calls = [(target, f, self.found[f.path], blocks, starts, source.fetch) for f in new]
        written = source.run(replaced, calls)
        self.written += [w for one in written for w in one]
        self.replaced |= {f.path: w for f, w in zip(new, written, strict=True)}
        if blocks is not None:
            self.insert(target, [self.found[f.path] for f in touched])
        return touched

    def _replacing(self, target: Target, view: Snapshot) -> list[DataFile]:
        files = list(view.files())
        calls = [(target, f, replace(view, columns=None)) for f in files]
        written = self.source.run(without, calls)
        self.replaced = {f.path: w for f, w in zip(files, written, strict=True) if w is not None}
        self.written += [w for one in self.replaced.values() for w in one]
        touched = [f for f in files if f.path in self.replaced]
        self.insert(target, [])
        return touched

    def insert(self, target: Target, found: Sequence[Any]) -> None:
        """Write the source's rows that no file had."""
        mask = np.ones(int(self.source.rows.sum()), bool)
        for one in found:
            mask[one[one >= 0]] = False
        if self.taken == mask.tobytes():
            return
        self.taken = mask.tobytes()
        self.added = []
        calls = [(target, parts, self.source.fetch) for parts in self._groups(mask)]
        self.added = [w for one in self.source.run(inserted, calls) for w in one]
        self.written += self.added

    def _groups(self, mask: np.ndarray[Any, Any]) -> Iterator[list[Any]]:
        """Blocks with rows to insert, small ones together."""
        held: list[Any] = []
        size, end = 0, 0
        for block, rows, weight in zip(
            self.source.blocks, self.source.rows.tolist(), self.source.sizes, strict=True
        ):
            part = mask[end : end + rows]
            end += rows
            if part.any():
                held.append((block, None if part.all() else part))
                size += weight
            if size >= GROUP_BYTES:
                yield held
                held, size = [], 0
        if held:
            yield held
