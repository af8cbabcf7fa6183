"""Reading rows of one data file exactly as the Delta protocol says.

Invariant: whatever way a file is cut into row ranges, the concatenation of the ranges is the
file's live rows in stored order, and each row keeps its identity: (file number, stored position).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from lepton.errors import LakeError
from lepton.lake.fields import Field, convert, locate, nulls
from lepton.lake.log import DataFile, Version, path_of

POSITION = "__position__"
"""Name of the int64 column that carries each row's stored position, where it is asked for."""


def read_rows(
    version: Version,
    file: DataFile,
    columns: Sequence[str],
    *,
    start: int = 0,
    stop: int | None = None,
    storage_options: Mapping[str, str] | None = None,
) -> pa.Table:
    """Return live rows with stored positions in [start, stop), plus :data:`POSITION`.

    Raises:
        LakeError: the file is missing or damaged, or a value does not fit its column's type.
    """
    full = path_of(version.uri, file.path)
    try:
        filesystem, path = _filesystem(version.uri, full, storage_options)
        with filesystem.open_input_file(path) as source:
            parquet = pq.ParquetFile(source, coerce_int96_timestamp_unit="us")
            return _rows(parquet, version, file, columns, start, stop)
    except (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as e:
        raise LakeError(
            f"cannot read {full!r} of table {version.uri!r}@{version.number}: {e}; "
            "if the file was vacuumed, read a newer version"
        ) from e


def stored_rows(
    version: Version, file: DataFile, storage_options: Mapping[str, str] | None = None
) -> int:
    """Return how many rows the file stores: from the log, else from the file's footer."""
    if file.rows is not None:
        return file.rows
    filesystem, path = _filesystem(version.uri, path_of(version.uri, file.path), storage_options)
    with filesystem.open_input_file(path) as source:
        return int(pq.read_metadata(source).num_rows)


def _filesystem(
    uri: str, full: str, options: Mapping[str, str] | None
) -> tuple[pafs.FileSystem, str]:
    if "://" not in full:
        return pafs.LocalFileSystem(use_mmap=True), full
    from deltalake.fs import DeltaStorageHandler

    handler: Any = DeltaStorageHandler(uri, dict(options) if options else None)
    return pafs.PyFileSystem(handler), full.removeprefix(uri.rstrip("/") + "/")


def _rows(
    parquet: pq.ParquetFile,
    version: Version,
    file: DataFile,
    columns: Sequence[str],
    start: int,
    stop: int | None,
) -> pa.Table:
    total = parquet.metadata.num_rows
    stop = total if stop is None else min(stop, total)
    start = min(start, stop)
    groups, first = _groups(parquet, start, stop)
    stored = parquet.schema_arrow
    fields = [f for f in version.fields if f.name in set(columns)]
    found = {f.name: locate(f, stored) for f in fields if f.name not in file.partition}
    names = [stored.field(at).name for at in found.values() if at is not None]
    raw = parquet.read_row_groups(groups, columns=names, use_threads=False)
    raw = raw.slice(start - first, stop - start)
    rows = stop - start
    arrays = [_column(raw, stored, f, found.get(f.name), file, rows) for f in fields]
    positions = pa.array(np.arange(start, stop, dtype=np.int64))
    schema = pa.schema([*(f.arrow() for f in fields), pa.field(POSITION, pa.int64())])
    table = pa.Table.from_arrays([*arrays, positions], schema=schema)
    kept = file.kept(total)
    table = table if kept is None else table.filter(pa.array(kept[start:stop]))
    return table.select([*columns, POSITION])


def _groups(parquet: pq.ParquetFile, start: int, stop: int) -> tuple[list[int], int]:
    """Return the row groups that overlap [start, stop) and the position where they begin."""
    sizes = [parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)]
    ends = np.cumsum(sizes)
    begins = ends - sizes
    groups = [g for g in range(len(sizes)) if begins[g] < stop and ends[g] > start]
    return groups, int(begins[groups[0]]) if groups else start


def _column(
    raw: pa.Table,
    stored: pa.Schema,
    field: Field,
    at: int | None,
    file: DataFile,
    rows: int,
) -> pa.ChunkedArray[Any]:
    if field.name in file.partition:
        return pa.chunked_array([_repeat(file.partition[field.name], field, rows)])
    if at is None:
        return pa.chunked_array([nulls(rows, field.type)])
    chunks = raw.column(stored.field(at).name).chunks
    make: Any = pa.chunked_array
    return make([convert(c, field) for c in chunks], type=field.type)


def _repeat(value: Any, field: Field, rows: int) -> Any:
    """A partition value, in its column's type, for every row."""
    if value is None:
        return nulls(rows, field.type)
    typed: Any = pa.scalar(value)
    cast: Any = pc.cast
    repeat: Any = pa.repeat
    return repeat(cast(typed, field.type) if typed.type != field.type else typed, rows)
