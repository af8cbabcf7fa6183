"""Reading rows of one data file exactly as the Delta protocol says.

Invariant: whatever way a file is cut into row ranges, the concatenation of the ranges is the
file's live rows in stored order, and each row keeps its identity: (file number, stored position).
"""

from __future__ import annotations

import mmap
from collections.abc import Container, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lepton.errors import LakeError
from lepton.lake.checksums import page_checked, verifies_pages
from lepton.lake.deletions import deleted_of, mask_of
from lepton.lake.fields import POSITION, Field, convert, has_ids, locate, nulls, repeat
from lepton.lake.groups import may_match
from lepton.lake.julian import gregorian, julian_of
from lepton.lake.log import DataFile, Version
from lepton.lake.paths import located, path_of
from lepton.lake.storage import store_of

Ints = np.ndarray[Any, np.dtype[np.int64]]
_Columns = tuple[list[Field], list[str | None], pa.Schema]

SAMPLE_ROWS = 256
SAMPLE_BUFFER = 1 << 16
"""Bytes that are fetched at once where only a file's first rows are wanted."""
DECODED_BYTES = 1 << 23
"""Each call that gives pages of a mapped file back stops the process's other threads."""


class OpenFile:
    """One data file, its footer read, ready to give row ranges. For one thread at a time.

    Attributes:
        sizes: rows of each row group.
    """

    def __init__(
        self,
        version: Version,
        file: DataFile,
        storage_options: Mapping[str, str] | None = None,
    ) -> None:
        """Open the file.

        Raises:
            LakeError: it is missing, or no whole Parquet file.
        """
        self._version = version
        self._file = file
        self._options = storage_options
        self._deleted: Ints | None = None
        self._full = path_of(version.uri, file.path)
        with self._explained():
            self._mapped, source = _opened(version.uri, self._full, storage_options)
            self._source = source
            self._parquet = pq.ParquetFile(
                source,
                coerce_int96_timestamp_unit="us",
                pre_buffer=self._mapped is None,  # a local file is in the page cache already
                page_checksum_verification=verifies_pages(),
            )
        metadata = self._parquet.metadata
        self._stored = self._parquet.schema_arrow
        self._julian = julian_of(metadata)
        self.sizes: Ints = np.array(
            [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)], np.int64
        )
        self._ends = np.cumsum(self.sizes)
        if file.rows is not None and file.rows != self.stored:
            with self._explained():
                raise ValueError(f"it has {self.stored} rows, and the log says {file.rows}")
        self._ahead: _Sequence | None = None
        self._decoded = 0
        self._found: dict[tuple[str, ...], _Columns] = {}

    @property
    def stored(self) -> int:
        """Rows in the file, deleted ones included."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def kept(self, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        """Return which of the stored rows [start, stop) are not deleted; None for all.

        Raises:
            LakeError: the file's deletion vector is lost or damaged.
        """
        vector = self._file.vector
        if vector is None:
            return None
        if self._deleted is None:
            self._deleted = deleted_of(self._version, self._file, self.stored, self._options)
        first, last = np.searchsorted(self._deleted, [start, stop])
        return mask_of(self._deleted[first:last] - start, stop - start)

    def ranges(self, conditions: Sequence[str], start: int, stop: int) -> list[tuple[int, int]]:
        """Cut [start, stop) down to the row groups that may hold rows that meet SQL conditions.

        Groups side by side make one range; where there is none, the one range is empty.
        """
        if not any(conditions) or len(self.sizes) == 0 or self._julian is not None:
            return [(start, stop)]
        version, file = self._version, self._file
        metadata = self._parquet.metadata
        with self._explained():
            may = may_match(metadata, self._stored, version.fields, file.partition, conditions)
        found: list[tuple[int, int]] = []
        for end, size, match in zip(self._ends.tolist(), self.sizes.tolist(), may, strict=True):
            first, last = max(start, end - size), min(stop, end)
            if not match or first >= last:
                continue
            if found and found[-1][1] == first:
                first = found.pop()[0]
            found.append((first, last))
        return found or [(start, start)]

    def rows(self, columns: Sequence[str], start: int, stop: int) -> pa.Table:
        """Return the columns of stored rows [start, stop), deleted rows included.

        A range inside one row group that goes on where the last such range ended is decoded from
        there on, not from the group's beginning.

        Raises:
            LakeError: the file is damaged, or a value does not fit its column's type.
        """
        fields, stored, schema = self._columns(tuple(columns))
        names = [name for name in stored if name is not None]
        with self._explained(start):
            raw = self._decode(names, start, stop)
            arrays = [
                self._column(raw, f, name, stop - start)
                for f, name in zip(fields, stored, strict=True)
            ]
        return pa.Table.from_arrays(arrays, schema=schema)

    def _columns(self, names: tuple[str, ...]) -> _Columns:
        """Find columns in the file: fields, names there (None: not stored), Arrow schema."""
        if names not in self._found:
            by_name = {f.name: f for f in self._version.fields}
            fields = [by_name[name] for name in names]
            if any(f.id is not None for f in fields) and not has_ids(self._stored):
                raise LakeError(
                    f"table {self._version.uri!r}@{self._version.number} maps columns by id, but "
                    f"{self._full!r} has no field ids; write that file's rows anew"
                )
            with self._explained():
                places = [
                    None if f.name in self._file.partition else locate(f, self._stored)
                    for f in fields
                ]
            stored = [None if at is None else self._stored.field(at).name for at in places]
            self._found[names] = (fields, stored, pa.schema([f.arrow() for f in fields]))
        return self._found[names]

    def whole_groups(self, start: int, stop: int) -> bool:
        """Whether [start, stop) begins and ends where row groups do."""
        return (start == 0 or start in self._ends) and stop in self._ends

    def bytes_of(self, physical: Container[str]) -> int:
        """Return the uncompressed size of some columns, by their names in the file."""
        metadata = self._parquet.metadata
        groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
        columns = [group.column(c) for group in groups for c in range(group.num_columns)]
        return sum(
            c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] in physical
        )

    def sampled(self, columns: Sequence[str]) -> float:
        """Return how many bytes a row of some columns takes once decoded: a mean of a few rows.

        Raises:
            LakeError: the file is damaged.
        """
        fields, stored, _ = self._columns(tuple(columns))
        names = [name for name in stored if name is not None]
        groups = np.flatnonzero(self.sizes)[:1].tolist()
        if not groups:
            return 0.0
        rows = min(SAMPLE_ROWS, int(self.sizes[groups[0]]))
        raw = pa.table({})
        with self._explained():
            if names:
                metadata = self._parquet.metadata
                few = pq.ParquetFile(self._source, metadata=metadata, buffer_size=SAMPLE_BUFFER)
                batches = few.iter_batches(rows, groups, names, use_threads=False)
                raw = pa.Table.from_batches([next(batches)])
            each = zip(fields, stored, strict=True)
            arrays = [self._column(raw, field, name, rows) for field, name in each]
        return sum(a.nbytes for a in arrays) / rows

    def checked(self) -> bool:
        """Whether the first page of every column chunk carries a checksum.

        Raises:
            LakeError: the file is damaged.
        """
        metadata = self._parquet.metadata
        groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
        chunks = [group.column(c) for group in groups for c in range(group.num_columns)]
        with self._explained():
            return all(
                page_checked(self._source, c.dictionary_page_offset or c.data_page_offset)
                for c in chunks
                if c.total_compressed_size
            )

    def rest(self) -> None:
        """Give up the memory of a range that might have been gone on with."""
        self._ahead = None
        self._forget()

    def close(self) -> None:
        """Give the file handle back."""
        self._parquet.close()

    def _decode(self, names: list[str], start: int, stop: int) -> pa.Table:
        if not names:
            return pa.table({})
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, stop, side="left"))
        groups = list(range(first, min(last + 1, len(self.sizes)) if stop > start else first))
        begin = int(self._ends[first] - self.sizes[first]) if groups else start
        if len(groups) != 1 or (start == begin and stop == int(self._ends[first])):
            whole = self._parquet.read_row_groups(groups, columns=names, use_threads=False)
            self._decoded += whole.nbytes
            raw = whole.slice(start - begin, stop - start)
        else:
            if self._ahead is None or not self._ahead.continues(first, start, names):
                self._ahead = _Sequence(self._parquet, first, begin, names, stop - start)
            raw = self._ahead.take(start, stop)
            self._decoded += raw.nbytes
            if stop == int(self._ends[first]):
                self._ahead = None  # the decoder's buffers go with it
        if self._decoded >= DECODED_BYTES:
            self._forget()
        return raw

    def _forget(self) -> None:
        """Let decoded pages of a mapped file no longer count as this process's memory."""
        if self._mapped is not None and self._decoded:
            self._mapped.madvise(mmap.MADV_DONTNEED)
        self._decoded = 0

    def _column(
        self, raw: pa.Table, field: Field, stored: str | None, rows: int
    ) -> pa.ChunkedArray[Any]:
        partition = self._file.partition
        if field.name in partition:
            return pa.chunked_array([repeat(partition[field.name], field, rows)])
        if stored is None:
            return pa.chunked_array([nulls(rows, field.type)])
        column = raw.column(stored)
        if self._julian is not None:
            column = gregorian(column, self._julian)
        if column.type == field.type and not field.children:
            return column
        make: Any = pa.chunked_array
        return make([convert(c, field) for c in column.chunks], type=field.type)

    @contextmanager
    def _explained(self, start: int | None = None) -> Generator[None]:
        try:
            yield
        except (OSError, ValueError, OverflowError, pa.ArrowException) as e:
            group = "" if start is None else f" (row group {self._group(start)})"
            raise LakeError(
                f"cannot read {self._full!r}{group} of table {self._version.uri!r}"
                f"@{self._version.number}: {e}; if the file was vacuumed, read a newer version; if "
                "it is damaged, restore it from a copy or restore the table to an older version"
            ) from e

    def _group(self, start: int) -> int:
        return int(np.searchsorted(self._ends, start, side="right"))


class _Sequence:
    """One row group, decoded piece by piece from its beginning."""

    def __init__(
        self, parquet: pq.ParquetFile, group: int, begin: int, names: list[str], size: int
    ) -> None:
        self._group = group
        self._names = names
        self._at = begin
        self._left = pa.table({})
        self._batches = parquet.iter_batches(
            batch_size=size, row_groups=[group], columns=names, use_threads=False
        )

    def continues(self, group: int, start: int, names: list[str]) -> bool:
        return self._group == group and self._names == names and self._at <= start

    def take(self, start: int, stop: int) -> pa.Table:
        parts: list[pa.Table] = []
        while self._at < stop:
            if len(self._left) == 0:
                self._left = pa.Table.from_batches([next(self._batches)])
            here = self._left.slice(0, stop - self._at)
            if self._at < start:
                here = self._left.slice(0, start - self._at)
            else:
                parts.append(here)
            self._left = self._left.slice(len(here))
            self._at += len(here)
        return pa.concat_tables(parts)


def read_rows(
    version: Version,
    file: DataFile,
    columns: Sequence[str],
    *,
    start: int = 0,
    stop: int | None = None,
    conditions: Sequence[str] = (),
    storage_options: Mapping[str, str] | None = None,
) -> pa.Table:
    """Return live rows with stored positions in [start, stop), plus :data:`POSITION`.

    Row groups in which no row can meet the SQL ``conditions`` are left out; rows of the others
    are not filtered.

    Raises:
        LakeError: the file is missing or damaged, or a value does not fit its column's type.
    """
    opened = OpenFile(version, file, storage_options)
    try:
        stop = opened.stored if stop is None else min(stop, opened.stored)
        start = min(start, stop)
        parts = opened.ranges(conditions, start, stop)
        return pa.concat_tables([_live(opened, columns, *part) for part in parts])
    finally:
        opened.close()


def _live(opened: OpenFile, columns: Sequence[str], start: int, stop: int) -> pa.Table:
    table = opened.rows(columns, start, stop)
    table = table.append_column(POSITION, pa.array(np.arange(start, stop, dtype=np.int64)))
    kept = opened.kept(start, stop)
    return table if kept is None else table.filter(pa.array(kept))


def stored_rows(
    version: Version, file: DataFile, storage_options: Mapping[str, str] | None = None
) -> int:
    """Return how many rows the file stores: from the log, else from the file's footer."""
    if file.rows is not None:
        return file.rows
    return int(group_sizes(version, file, storage_options).sum())


def group_sizes(
    version: Version, file: DataFile, storage_options: Mapping[str, str] | None = None
) -> Ints:
    """Return the rows of each row group, from the file's footer.

    Raises:
        LakeError: the file is missing, or no whole Parquet file.
    """
    opened = OpenFile(version, file, storage_options)
    opened.close()
    return opened.sizes


def unchecked_files(
    version: Version, storage_options: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Return the paths of data files without page checksums: there damage may go unnoticed.

    Reads footers and page headers only; rewriting such a file by a writer of checksums helps.

    Raises:
        LakeError: a file is missing or damaged.
    """
    found: list[str] = []
    for file in version.files:
        opened = OpenFile(version, file, storage_options)
        try:
            if not opened.checked():
                found.append(file.path)
        finally:
            opened.close()
    return tuple(found)


def bytes_per_row(
    version: Version,
    file: DataFile,
    columns: Sequence[str],
    storage_options: Mapping[str, str] | None = None,
) -> tuple[float, float]:
    """Estimate the size of a row: as it is stored, and decoded.

    Both are by type where it is fixed. Else the footer tells the one, and the file's first rows the
    other: text that repeats is stored once.
    """
    fields = [f for f in version.fields if f.name in set(columns)]
    widths = {f.name: _width(f.type) for f in fields}
    total = float(sum(w for w in widths.values() if w is not None))
    varying = [f for f in fields if widths[f.name] is None]
    if not varying:
        return total, total
    opened = OpenFile(version, file, storage_options)
    try:
        stored = opened.bytes_of({f.physical for f in varying}) / max(1, opened.stored)
        return total + stored, total + opened.sampled([f.name for f in varying])
    finally:
        opened.close()


def _width(kind: pa.DataType) -> int | None:
    try:
        return max(1, kind.bit_width // 8)
    except ValueError:  # strings, lists and the like
        return None


def _opened(
    uri: str, full: str, options: Mapping[str, str] | None
) -> tuple[mmap.mmap | None, pa.NativeFile]:
    """Open a file: mapped into memory where it is local."""
    if "://" not in full:
        with Path(full).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        buffer: Any = pa.py_buffer
        return mapped, pa.BufferReader(buffer(mapped))
    inside = f"{uri.rstrip('/')}/"
    if not full.startswith(inside):
        store, name = located(full, options)
        return None, store.open_input_file(name)
    return None, store_of(uri, options).open_input_file(full.removeprefix(inside))
