"""A snapshot: one table at one version, some of its columns, some of its rows. Immutable.

Everything downstream (streams, evaluations, lineage) holds a Snapshot, so that "which data" is
always answered by ``uri@version`` plus columns and filter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lepton.errors import LakeError
from lepton.lake.deletions import mask_of
from lepton.lake.history import Commit, history_of
from lepton.lake.log import DataFile, Version, load_version, open_table
from lepton.lake.predicate import columns_read, expression_of, near_names, sql_of
from lepton.lake.read import POSITION, deleted_of, read_rows, stored_rows
from lepton.lake.statistics import statistics_of, verdicts

if TYPE_CHECKING:
    import ray.data

    from lepton.stream import Stream
    from lepton.stream.reader import Transform
    from lepton.stream.stream import Engine


def table(
    uri: str | os.PathLike[str],
    *,
    version: int | datetime | None = None,
    storage_options: Mapping[str, str] | None = None,
    catalog: ray.data.Catalog | None = None,
) -> Snapshot:
    """Pin a Delta table at a version.

    Args:
        uri: a path, or a URL that deltalake understands (``s3://``, ``az://``, ``gs://``).
        version: a version number, a time (the version then current), or None for the newest.
        storage_options: credentials and endpoints, as deltalake takes them; they win over the
            catalog's.
        catalog: a Ray Data catalog, such as ``ray.data.DatabricksUnityCatalog``: ``uri`` is then
            a name in it, such as ``main.sales.orders``.

    Raises:
        LakeError: no table there, no such version, or a reader feature lepton lacks.
    """
    text = os.fspath(uri)
    if catalog is not None:
        from lepton.lake.catalog import resolve

        text, storage_options = resolve(text, catalog, storage_options)
    if text.startswith("file://"):
        text = unquote(text.removeprefix("file://"))
    if "://" not in text:
        text = str(Path(text).absolute())
    text = text.rstrip("/")
    opened = open_table(text, version, storage_options)
    options = tuple(sorted((storage_options or {}).items()))
    snapshot = Snapshot(uri=text, version=opened.version(), options=options)
    if snapshot.load().table_id != str(opened.metadata().id):  # made anew in the old one's place
        load_version.cache_clear()
        verdicts.cache_clear()
        snapshot.load()
    return snapshot


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A pinned, immutable view of a Delta table. Made by :func:`lepton.table`.

    Attributes:
        uri: the table's absolute path or URL.
        version: the Delta version number.
        options: storage options, as sorted pairs.
        columns: the selected columns in order, or None for all.
        predicate: rows to keep, or None for all.
        conditions: the parts of ``predicate`` as SQL, for judging files by statistics; empty
            where a part cannot be put as SQL for certain.
    """

    uri: str
    version: int
    options: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    columns: tuple[str, ...] | None = None
    predicate: pc.Expression | None = None
    conditions: tuple[str, ...] = field(default=(), repr=False, compare=False)

    def load(self) -> Version:
        """Return the replayed log of this version (cached per process)."""
        return load_version(self.uri, self.version, self.options)

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema of the selected columns."""
        whole: Any = self.load().schema
        return whole if self.columns is None else pa.schema([whole.field(c) for c in self.columns])

    def select(self, columns: Sequence[str]) -> Snapshot:
        """Return a snapshot with these columns only, in this order.

        Raises:
            LakeError: a column that the table does not have.
        """
        known = self.load().schema.names
        unknown = [c for c in columns if c not in known]
        if unknown or not columns:
            raise LakeError(
                f"table {self.uri!r}@{self.version} has no column "
                + (", ".join(f"{c}{near_names(c, known)}" for c in unknown) or "(none)")
                + f"; it has: {', '.join(known)}"
            )
        return replace(self, columns=tuple(columns))

    def where(self, condition: pc.Expression | str) -> Snapshot:
        """Return a snapshot with only the rows for which ``condition`` is true.

        Args:
            condition: a ``pyarrow.compute`` expression or a SQL-like string such as
                ``"split = 'train' AND label < 5"``; conditions given one after another add up.

        Raises:
            LakeError: it does not parse or names an unknown column.
        """
        schema = self.load().schema
        try:
            added = expression_of(condition, schema)
        except LakeError as e:
            raise LakeError(f"table {self}: {e}") from e
        whole = added if self.predicate is None else self.predicate & added
        return replace(
            self, predicate=whole, conditions=(*self.conditions, sql_of(condition, schema) or "")
        )

    def files(self) -> tuple[DataFile, ...]:
        """Return the data files that may hold rows of this snapshot, by path.

        Files that partition values or the log's statistics rule out are left out.
        """
        version = self.load()
        if self.predicate is None:
            return version.files
        if self._by_partition():
            return self._files_by_partition(version)
        return verdicts(self.uri, self.version, self.options, self.conditions)[0]

    def _files_by_partition(self, version: Version) -> tuple[DataFile, ...]:
        whole: Any = version.schema
        columns: dict[str, Any] = {
            c: pa.array([f.partition.get(c) for f in version.files], type=whole.field(c).type)
            for c in version.partition_columns
        }
        columns["__file__"] = pa.array(range(len(version.files)), pa.int64())
        make: Any = pa.table
        kept: Any = self._filtered(make(columns), "its partition values")
        numbers: list[int] = kept["__file__"].to_pylist()
        return tuple(version.files[i] for i in numbers)

    def read_file(self, file: DataFile, *, start: int = 0, stop: int | None = None) -> pa.Table:
        """Return this snapshot's rows of one file, stored positions [start, stop), in order.

        The last column, ``__position__``, holds each row's stored position (int64).
        """
        return self.read_part(self.load(), file, start=start, stop=stop)

    def read_part(
        self, version: Version, file: DataFile, *, start: int = 0, stop: int | None = None
    ) -> pa.Table:
        """As :meth:`read_file`, with the version given: no log is replayed."""
        wanted = list(self.columns or version.schema.names)
        needed = wanted
        if self.predicate is not None:
            extra = columns_read(self.predicate, version.schema)
            needed = [*wanted, *sorted(extra - set(wanted))]
        rows = read_rows(
            version,
            file,
            needed,
            start=start,
            stop=stop,
            conditions=self.conditions,
            storage_options=dict(self.options),
        )
        if self.predicate is not None:
            rows = self._filtered(rows, f"file {file.path!r}")
        return rows.select([*wanted, POSITION])

    def _filtered(self, rows: pa.Table, what: str) -> pa.Table:
        """The rows that meet the condition, which a value may be too much for."""
        condition: Any = self.predicate
        try:
            return rows.filter(condition)
        except pa.ArrowException as e:
            raise LakeError(
                f"table {self}: the filter {condition} cannot be worked out for {what}: "
                f"{str(e).splitlines()[0]}; write it without what overflows or divides by zero"
            ) from e

    def positions(self, file: DataFile) -> np.ndarray[Any, np.dtype[np.int64]] | int:
        """Return the stored positions of this snapshot's rows of a file; a count if it is all.

        Answers from the log alone unless a deletion vector or a row filter is in play.
        """
        version = self.load()
        if self.predicate is not None and not self._by_partition():
            may = verdicts(self.uri, self.version, self.options, self.conditions)[1]
            if file.path not in may:
                return np.empty(0, np.int64)
            counting = replace(
                self, columns=tuple(sorted(columns_read(self.predicate, version.schema)))
            )
            return counting.read_file(file)[POSITION].to_numpy()
        options = dict(self.options)
        rows = stored_rows(version, file, options)
        if file.vector is None:
            return rows
        kept = mask_of(deleted_of(version, file, rows, options), rows)
        return np.flatnonzero(kept).astype(np.int64)

    def count_rows(self) -> int:
        """Return the number of rows: from the log where it tells, else by reading the filter."""
        sure: frozenset[str] = frozenset()
        if self.predicate is not None and not self._by_partition():
            sure = verdicts(self.uri, self.version, self.options, self.conditions)[2]
        by_log = self._by_partition()
        version, options = self.load(), dict(self.options)
        total = 0
        for file in self.files():
            if by_log or file.path in sure:
                gone = file.vector.deleted if file.vector else 0
                total += stored_rows(version, file, options) - gone
            else:
                found = self.positions(file)
                total += found if isinstance(found, int) else len(found)
        return total

    def batches(self) -> Iterator[pa.Table]:
        """Yield the rows file by file."""
        for file in self.files():
            yield self.read_file(file).drop_columns(POSITION)

    def head(self, n: int = 5) -> pa.Table:
        """Return the first ``n`` rows (by file path and position)."""
        if n < 0:
            raise ValueError(f"head(n) needs n >= 0, not {n}")
        found, count = [self.schema.empty_table()], 0
        for rows in self._beginning(max(n, 1000)) if n else ():
            found.append(rows.drop_columns(POSITION))
            count += len(rows)
            if count >= n:
                break
        return pa.concat_tables(found).slice(0, n).combine_chunks()

    def _beginning(self, step: int) -> Iterator[pa.Table]:
        """Yield the rows in pieces: of each file the first ``step`` rows, then longer ones."""
        for file in self.files():
            rows = stored_rows(self.load(), file, dict(self.options))
            start, size = 0, step
            while start < rows:
                yield self.read_file(file, start=start, stop=start + size)
                start, size = start + size, 8 * size

    def to_arrow(self) -> pa.Table:
        """Return all rows in memory, by file path and position."""
        return pa.concat_tables([self.schema.empty_table(), *self.batches()])

    def to_dataset(self) -> ray.data.Dataset:
        """Return the rows as a Ray Dataset: read file by file, in this snapshot's order.

        Small files share a task. Rows keep the order where Ray Data's ``preserve_order`` is set.
        """
        from lepton.lake.ray_source import read_snapshot

        return read_snapshot(self)

    def changes(self, since: int) -> pa.Table:
        """Return the rows that changed after version ``since``, commit by commit.

        Column ``_change_type`` holds ``insert``, ``delete``, ``update_preimage`` or
        ``update_postimage``, and ``_commit_version`` the commit. Updates are told apart only where
        the table has a change data feed; elsewhere an updated row is a delete and an insert, and a
        rewritten file's unchanged rows are both.

        Raises:
            LakeError: ``since`` is not an earlier version, or its log or files are gone.
        """
        if not 0 <= since <= self.version:
            raise LakeError(
                f"changes(since={since}): table {self} has versions 0 to {self.version}"
            )
        from lepton.lake.changes import changes_of

        return changes_of(self, since)

    def statistics(self) -> pa.Table:
        """Return what the log says of each file, by path: rows, bytes, partition, min, max, nulls.

        Columns ``min``, ``max`` and ``null_count`` are structs under the columns' logical names,
        as the writer left them: strings and timestamps may be cut. The filter is not applied.
        """
        return statistics_of(self.load())

    def history(self) -> list[Commit]:
        """Return the commits up to this version that the log still holds, newest first.

        Raises:
            LakeError: the log cannot be read.
        """
        return history_of(self.uri, self.version, dict(self.options))

    def stream(
        self,
        *,
        batch_size: int,
        seed: int = 0,
        epochs: int = 1,
        columns: Sequence[str] | None = None,
        shuffle: bool = True,
        lanes: int | None = None,
        engine: Engine = "auto",
        transform: Transform | None = None,
        follow: bool = False,
    ) -> Stream:
        """Return a deterministic row stream; see :class:`lepton.stream.Stream`.

        Args:
            batch_size: rows in a global batch, over all workers together.
            seed: decides the order, together with the epoch.
            epochs: passes over the rows.
            columns: which columns to deliver; default those of this snapshot.
            shuffle: False keeps file order.
            lanes: the most workers that can share the stream.
            engine: ``auto``, ``worker`` or ``ray_data``; the order is the same.
            transform: a Preparation, or a function from an Arrow table (a window's rows) to one
                with the same rows, or with fewer if it keeps the column ``__row__``.
            follow: move to the table's newest version at each epoch's end.

        Raises:
            ValueError: an option is impossible, such as a batch smaller than the lanes.
        """
        from lepton.stream import Stream

        return Stream(
            snapshot=self if columns is None else self.select(columns),
            batch_size=batch_size,
            seed=seed,
            epochs=epochs,
            shuffle=shuffle,
            lanes=lanes,
            engine=engine,
            transform=transform,
            follow=follow,
        )

    def _by_partition(self) -> bool:
        """Whether the filter needs nothing but partition values."""
        if self.predicate is None:
            return True
        version = self.load()
        return columns_read(self.predicate, version.schema) <= set(version.partition_columns)

    def __str__(self) -> str:
        return f"{self.uri}@{self.version}"


def refuse_empty(snapshot: Snapshot) -> None:
    """Raise LakeError if the snapshot has no rows."""
    if snapshot.count_rows() == 0:
        raise LakeError(f"table {snapshot} has no rows to read (after its filter, if any)")
