"""The rows that a write was given: of this process, or of a Ray Dataset where they are.

They are aligned and checked before anything of them is written; on bad rows nothing is left behind.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from lepton.errors import LakeError
from lepton.lake.commit import discard
from lepton.lake.files import FILE_BYTES, Written, write_files
from lepton.lake.predicate import expression_of, near_names
from lepton.lake.rewrite import Source, write_all
from lepton.lake.rows import align, check_names, check_rows, comparable, refuse_duplicates
from lepton.lake.rules import Rules

FILES_AT_ONCE = 4
"""Files that are read or written at once, at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where rows go: the table, the columns that identify a row, the rows that they replace."""

    path: str
    options: dict[str, str] | None = field(repr=False)
    key: tuple[str, ...] = ()
    where: str | None = None
    deletes: bool = False


class Rows:
    """The rows to write."""

    def __init__(self, data: Any, place: Place) -> None:
        """Look at the rows' schema, where that computes nothing."""
        self._data = data
        self._place = place
        self._spread = hasattr(data, "write_datasink")
        self._reader = None if self._spread else _reader(data)
        self._table: pa.Table | None = None
        self.schema = None if self._reader is None else self._reader.schema

    def needed_schema(self) -> pa.Schema:
        """The rows' schema; a Dataset may have to compute its first block for it."""
        if self.schema is None:
            from lepton.lake.ray_sink import schema_of

            self.schema = schema_of(self._data)
        return self.schema

    def source(self, rules: Rules) -> Source:
        """The rows, aligned and checked, for a change by key or condition.

        Raises:
            LakeError: rows do not fit, or a key is there twice; nothing was written.
        """
        check = check_of(rules, self._place)
        key, schema = self._place.key, cast("Any", rules.schema)
        known: list[str] = schema.names
        for name in key:
            if name not in known:
                raise LakeError(f"no key column {name}{near_names(name, known)}")
            kind: Any = schema.field(name).type
            if pa.types.is_nested(kind):
                raise LakeError(f"key column {name} is {kind}: only plain values can be keys")
        if self._spread:
            from lepton.lake.ray_rewrite import source_of

            source = source_of(self._data, check, key)
        else:
            if self._table is None:
                self._table = cast("pa.RecordBatchReader", self._reader).read_all()
            rows = check(self._table)
            source = Source(
                blocks=[rows],
                rows=np.array([len(rows)], np.int64),
                sizes=[rows.nbytes],
                keys=comparable(rows, key) if key else None,
                fetch=_same,
                run=partial(_in_threads, _at_once(self._place.path)),
            )
        if key and source.keys is not None:
            refuse_duplicates(source.keys, key)
        return source

    def write(self, rules: Rules) -> list[Written]:
        """Write data files; on bad rows nothing is left behind."""
        place = self._place
        if "://" not in place.path:
            Path(place.path).mkdir(parents=True, exist_ok=True)
        if place.key:
            return write_all(self.source(rules), rules, place.path, place.options)
        if self._reader is not None:
            return _files(self._reader, rules, place)
        from lepton.lake.ray_sink import write_dataset

        return write_dataset(self._data, rules, place.path, place.options)


def check_of(rules: Rules, place: Place) -> Callable[[pa.Table], pa.Table]:
    """Return what aligns and checks rows; it may be sent to tasks."""

    def check(rows: pa.Table) -> pa.Table:
        return _checked(rows, rules, place)

    return check


def _checked(rows: pa.Table, rules: Rules, place: Place) -> pa.Table:
    if place.deletes:
        check_names(rows.schema.names, rules.schema, fill=True)
        lost = [n for n in place.key if n not in rows.schema.names]
        if lost:
            raise LakeError(f"the rows lack key column {', '.join(lost)}")
        kept: Any = rules.schema
        return align(rows.select(list(place.key)), pa.schema([kept.field(n) for n in place.key]))
    rows = align(rows, rules.schema)
    check_rows(rows, rules.schema, rules.constraints)
    if place.where is not None:
        outside = len(rows) - len(rows.filter(expression_of(place.where, rules.schema)))
        if outside:
            raise LakeError(f"{outside} rows do not match where={place.where!r}")
    return rows


def _same(block: pa.Table) -> pa.Table:
    return block


def _at_once(path: str) -> int:
    """How many files memory should hold at once: no more than there are processors for here."""
    return FILES_AT_ONCE if "://" in path else min(FILES_AT_ONCE, os.cpu_count() or 1)


def _in_threads(
    at_once: int, function: Callable[..., Any], calls: list[tuple[Any, ...]]
) -> list[Any]:
    """Call a function with each list of arguments, some at once."""
    with ThreadPoolExecutor(at_once) as threads:
        asked = [threads.submit(function, *call) for call in calls]
        return [one.result() for one in asked]


def _files(reader: pa.RecordBatchReader, rules: Rules, place: Place) -> list[Written]:
    """Write the rows, small batches together; on bad rows nothing is left behind."""
    path, options = place.path, place.options
    written: list[Written] = []
    try:
        for rows in _coalesced(reader):
            checked = _checked(rows, rules, place)
            columns, fields = rules.partition_columns, rules.stored
            written += write_files(checked, path, columns, options, fields=fields)
    except BaseException:
        discard(written, path, options)
        raise
    return written


def _coalesced(reader: pa.RecordBatchReader) -> Iterator[pa.Table]:
    held: list[pa.RecordBatch] = []
    for batch in reader:
        held.append(batch)
        if sum(b.nbytes for b in held) >= FILE_BYTES:
            yield pa.Table.from_batches(held, reader.schema)
            held = []
    if held:
        yield pa.Table.from_batches(held, reader.schema)


def _reader(data: Any) -> pa.RecordBatchReader:
    if isinstance(data, pa.Table):
        return data.to_reader()
    if isinstance(data, pa.RecordBatchReader):
        return data
    if hasattr(data, "iter_batches"):  # a Ray Dataset
        batches = cast("Iterator[pa.Table]", iter(data.iter_batches(batch_format="pyarrow")))
        first = next(batches, None)
        if first is None:
            raise LakeError("the Ray Dataset has no rows, so it has no schema to write")
        return pa.RecordBatchReader.from_batches(first.schema, _flatten(first, batches))
    if hasattr(data, "to_numpy"):  # a pandas frame
        return pa.Table.from_pandas(data, preserve_index=False).to_reader()
    raise TypeError(
        f"cannot write a {type(data).__name__}: give an Arrow table, a pandas frame or a "
        "Ray Dataset"
    )


def _flatten(first: pa.Table, rest: Iterator[pa.Table]) -> Iterator[pa.RecordBatch]:
    yield from first.to_batches()
    for batch in rest:
        yield from batch.cast(first.schema).to_batches()
