"""Data files as lepton writes them: Parquet with page checksums and complete statistics.

A file's name is new each time, so that a write that is tried again never touches what an earlier
try left; nothing counts until a commit names it. Folder names of partitions are for people only:
partition values stand in the log (Delta protocol, "Partition Value Serialization").
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from lepton.errors import LakeError
from lepton.lake.encoding import repeating
from lepton.lake.fields import Field
from lepton.lake.mapping import stored, stored_partition
from lepton.lake.storage import again, store_of

pc: Any = pyarrow.compute  # its stubs know no arrays of unknown type
FILE_BYTES = 256 * 2**20  # of Arrow memory, before compression
_INDEXED, _PREFIX, _LAST = 32, 32, "\U0010ffff"  # as Delta's own writers: columns, characters


@dataclass(frozen=True, slots=True)
class Written:
    """A file that a commit may add: path inside the table, bytes, partition, statistics.

    It holds rows of the table or, with ``feed``, rows that tell what became of rows.
    """

    path: str
    size: int
    partition: Mapping[str, str | None]
    statistics: str
    modified_ms: int
    feed: bool = False


def write_files(
    rows: pa.Table,
    uri: str,
    partition_columns: Sequence[str] = (),
    options: Mapping[str, str] | None = None,
    *,
    job: str = "",
    feed: bool = False,
    fields: Sequence[Field] = (),
) -> list[Written]:
    """Write rows (aligned, checked) as data files of at most about 256 MiB in memory.

    Their names begin with ``part-`` and the job's name; those of change data (``feed``) are in a
    folder of their own. With ``fields`` columns go under their physical names.

    Raises:
        LakeError: a partition value that Delta cannot tell from NULL, or of a type it cannot hold.
        OSError: the storage does.
    """
    store = store_of(uri, options)
    written: list[Written] = []
    for partition, part in list(_partitions(rows, partition_columns)):
        folder = "".join(f"{_plain(k)}={_plain(v)}/" for k, v in partition.items())
        folder = f"_change_data/{folder}" if feed else folder
        if folder and "://" not in uri:
            Path(uri, folder).mkdir(parents=True, exist_ok=True)
        step = max(1, len(part) * FILE_BYTES // max(1, part.nbytes))
        for start in range(0, len(part), step):
            piece = stored(part.slice(start, step), fields)
            path, size = again(lambda f=folder, p=piece: _write(store, f"{f}part-{job}", p))
            now = int(time.time() * 1000)
            told = "" if feed else statistics_json(piece)
            at = stored_partition(partition, fields)
            written.append(Written(path, size, at, told, now, feed))
    return written


def _write(store: pafs.FileSystem, start: str, rows: pa.Table) -> tuple[str, int]:
    """Write a file of a new name, so that what a try before left is never taken for it."""
    path = f"{start}{uuid.uuid4()}.snappy.parquet"
    with store.open_output_stream(path) as sink:
        pq.write_table(
            rows,
            sink,
            write_page_checksum=True,
            store_schema=False,
            use_dictionary=repeating(rows),  # type: ignore[arg-type]  # the stubs know no names
        )
        size = sink.tell()
    return path, size


def _partitions(
    rows: pa.Table, columns: Sequence[str]
) -> Iterator[tuple[dict[str, str | None], pa.Table]]:
    if not columns:
        if len(rows):
            yield {}, rows
        return
    if len(columns) == rows.num_columns:
        raise LakeError("every column is a partition column, so files would have no rows")
    keys: Any = rows.select(list(columns)).append_column(
        "\0at", pa.array(range(len(rows)), pa.int64())
    )
    groups: Any = keys.group_by(list(columns), use_threads=False).aggregate([("\0at", "list")])
    rest = rows.drop_columns(list(columns))
    for group in range(len(groups)):
        partition = {c: _text_of(groups[c][group], c) for c in columns}
        yield partition, rest.take(groups["\0at_list"][group].values)


def _text_of(scalar: Any, column: str) -> str | None:
    value = scalar.as_py()
    if value is None:
        return None
    if value == "" or isinstance(value, bytes | list | dict):
        raise LakeError(
            f"partition column {column} has the value {value!r}, which Delta cannot store as one "
            "(the empty string is its NULL); use another value or partition column"
        )
    if isinstance(value, bool):
        return str(value).lower()
    if pa.types.is_timestamp(scalar.type):
        text = pc.strftime(scalar, format="%Y-%m-%d %H:%M:%S").as_py()
        return str(text)
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{'-' if value < 0 else ''}Infinity"
    return str(value)


def _plain(text: str | None) -> str:
    """Return a folder name that needs no escaping anywhere; people can still read it."""
    if text is None:
        return "__HIVE_DEFAULT_PARTITION__"
    if re.fullmatch(r"[A-Za-z0-9_.-]{1,80}", text) and text.strip("."):
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9_-]", "_", text[:40]) + "_" + digest


def statistics_json(rows: pa.Table) -> str:
    """Return a file's statistics as the Delta log has them ("Per-file Statistics").

    Minima and maxima bound every value; strings are cut to 32 characters. A column without a
    bound that is certain (NaN, booleans, bytes, decimals beyond a double) has only its NULL count.
    """
    low: dict[str, Any] = {}
    high: dict[str, Any] = {}
    empty: dict[str, Any] = {}
    for name in rows.column_names[:_INDEXED]:
        _collect(name, rows[name], low, high, empty)
    return json.dumps(
        {"numRecords": len(rows), "minValues": low, "maxValues": high, "nullCount": empty},
        allow_nan=False,
    )


def _collect(name: str, column: Any, low: Any, high: Any, empty: Any) -> None:
    kind = column.type
    if pa.types.is_struct(kind):
        inner: tuple[Any, Any, Any] = ({}, {}, {})
        for i in range(kind.num_fields):
            _collect(kind.field(i).name, pc.struct_field(column, [i]), *inner)
        for target, found in zip((low, high, empty), inner, strict=True):
            if found:
                target[name] = found
        return
    empty[name] = column.null_count
    bounds = _bounds(column)
    if bounds is not None:
        low[name], high[name] = bounds


def _bounds(column: Any) -> tuple[Any, Any] | None:
    kind = column.type
    if pa.types.is_nested(kind) or pa.types.is_boolean(kind) or pa.types.is_binary(kind):
        return None
    if pa.types.is_decimal(kind) and kind.precision > 15:
        return None
    if pa.types.is_floating(kind) and not pc.all(pc.is_finite(column), min_count=0).as_py():
        return None
    ends = pc.min_max(column)
    try:
        low, high = ends["min"].as_py(), ends["max"].as_py()
    except (ValueError, OverflowError):  # a time that Python has no name for
        return None
    if low is None:
        return None
    if isinstance(low, str):
        return _cut(low, high)
    if pa.types.is_decimal(kind):
        return float(low), float(high)
    if pa.types.is_temporal(kind):
        return _time(low), _time(high)
    return low, high


def _cut(low: str, high: str) -> tuple[str, str] | None:
    if len(high) > _PREFIX:
        if high[_PREFIX] == _LAST:
            return None
        high = high[:_PREFIX] + _LAST
    return low[:_PREFIX], high


def _time(value: Any) -> str:
    return str(value.isoformat()).replace("+00:00", "Z")
