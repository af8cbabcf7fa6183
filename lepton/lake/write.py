"""Writing to Delta in one commit: all of it or none of it, and with ``txn`` only once.

Appends and overwrites write their own data files (page checksums, complete statistics); merge and
replace_where are deltalake's, whose files have no page checksums.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import pyarrow as pa
from deltalake import DeltaTable, Schema, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError

from lepton.errors import LakeError
from lepton.lake.commit import commit_files, conflict, create, discard, properties_of, reached
from lepton.lake.fields import fields_of
from lepton.lake.files import FILE_BYTES, Written, write_files
from lepton.lake.kinds import storable
from lepton.lake.predicate import expression_of
from lepton.lake.rows import align, check_names, check_rows, refuse_duplicates
from lepton.lake.rules import Rules, rules_of
from lepton.lake.snapshot import Snapshot, table

Mode = Literal["append", "overwrite", "merge", "replace_where"]


def write(
    data: Any,
    uri: str | os.PathLike[str],
    *,
    mode: Mode = "append",
    key: str | Sequence[str] | None = None,
    where: str | None = None,
    partition_by: Sequence[str] | None = None,
    txn: tuple[str, int] | None = None,
    storage_options: Mapping[str, str] | None = None,
) -> Snapshot:
    """Write rows to a Delta table in one commit and return the snapshot that holds them.

    Columns, types, NULLs and constraints are checked before the commit: columns must be the
    table's, and a type changes only where every value stays the same.

    Args:
        data: an Arrow table or reader, a pandas frame, or a Ray Dataset.
        uri: the table; made when it is not there yet (except by ``replace_where``).
        mode: ``append``; ``overwrite`` every row; ``merge`` updates rows with an equal key and
            inserts the rest; ``replace_where`` replaces exactly the rows that match ``where``.
        key: column or columns that identify a row, for ``merge``.
        where: SQL condition, for ``replace_where``.
        partition_by: partition columns of a new table.
        txn: (application id, version): a write whose version this application has already
            reached is skipped, so that retrying is safe.
        storage_options: as deltalake takes them.

    Raises:
        ValueError: arguments that do not go together.
        WriteConflict: another writer's commit came first and does not go with this one.
        LakeError: the rows do not fit the table, or the commit failed; nothing was written.
    """
    path = os.fspath(uri)
    if "://" not in path:
        path = str(Path(path).absolute())
    path = path.removeprefix("file://").rstrip("/")
    _check(mode, key, where)
    options = dict(storage_options) if storage_options else None
    try:
        _write(data, path, mode, _names(key), where, partition_by, txn, options)
    except (DeltaError, OSError, ValueError, pa.ArrowException) as e:
        raise LakeError(f"cannot write to {path!r}; nothing was committed: {e}") from e
    return table(path, storage_options=options)


def _write(  # noqa: C901 (the course of a write, step by step)
    data: Any,
    path: str,
    mode: Mode,
    key: list[str],
    where: str | None,
    partition_by: Sequence[str] | None,
    txn: tuple[str, int] | None,
    options: dict[str, str] | None,
) -> None:
    known = DeltaTable.is_deltatable(path, options)
    if not known and mode == "replace_where":
        raise LakeError(f"no Delta table at {path!r} for replace_where to change")
    opened = DeltaTable(path, storage_options=options) if known else None
    if opened is not None and reached(opened, txn):
        return
    reader = _reader(data)
    if opened is None:
        rules = _new_rules(reader.schema, path, partition_by)
    else:
        rules = rules_of(opened, path)
        _check_partitions(rules, partition_by)
    try:
        check_names(reader.schema.names, rules.schema)
        if rules.append_only and mode != "append":
            raise LakeError(f"it is append-only, so mode={mode!r} is refused")
        if opened is not None and mode in ("merge", "replace_where"):
            rows = _checked(reader.read_all(), rules, key, where)
            _by_deltalake(opened, rows, path, mode, key, where, txn, options)
            return
        files = _files(reader, rules, path, key, options)
    except LakeError as e:
        if type(e) is not LakeError:
            raise
        raise LakeError(f"cannot write to table {rules.what}; nothing was committed: {e}") from e
    if opened is None:
        if create(path, rules, files, txn, options):
            return
        opened, rules = _made_meanwhile(path, rules, files, options)
    how = "overwrite" if mode == "overwrite" else "append"
    if reached(opened, txn):
        discard(files, path, options)
        return
    commit_files(opened, rules, files, uri=path, mode=how, txn=txn, options=options)


def _made_meanwhile(
    path: str, rules: Rules, files: Sequence[Written], options: dict[str, str] | None
) -> tuple[DeltaTable, Rules]:
    """Open the table that another process made first, if it is the same kind of table."""
    opened = DeltaTable(path, storage_options=options)
    made = rules_of(opened, path)
    same = (made.schema, made.partition_columns) == (rules.schema, rules.partition_columns)
    if not same or made.constraints:
        discard(files, path, options)
        raise conflict(opened, -1, path)
    return opened, made


def _check_partitions(rules: Rules, partition_by: Sequence[str] | None) -> None:
    if partition_by is not None and tuple(partition_by) != rules.partition_columns:
        raise LakeError(
            f"table {rules.what} is partitioned by {list(rules.partition_columns)}, not by "
            f"{list(partition_by)}; nothing was written: leave partition_by= out"
        )


def _new_rules(given: pa.Schema, path: str, partition_by: Sequence[str] | None) -> Rules:
    parts = tuple(partition_by or ())
    unknown = [p for p in parts if p not in given.names]
    if unknown:
        raise LakeError(f"new table {path!r}: no column {unknown} to partition by")
    try:
        kept = storable(given)
    except LakeError as e:
        raise LakeError(f"cannot make table {path!r}; nothing was written: {e}") from e
    fields = fields_of(Schema.from_arrow(kept).to_json(), "none")
    return Rules(
        what=f"{path!r} (new)",
        schema=pa.schema([f.arrow() for f in fields]),
        partition_columns=parts,
        constraints={},
    )


def _checked(rows: pa.Table, rules: Rules, key: Sequence[str], where: str | None) -> pa.Table:
    rows = align(rows, rules.schema)
    check_rows(rows, rules.schema, rules.constraints)
    if key:
        refuse_duplicates(rows, key)
    if where is not None:
        outside = len(rows) - len(rows.filter(expression_of(where, rules.schema)))
        if outside:
            raise LakeError(f"{outside} rows do not match where={where!r}")
    return rows


def _files(
    reader: pa.RecordBatchReader,
    rules: Rules,
    path: str,
    key: Sequence[str],
    options: dict[str, str] | None,
) -> list[Written]:
    """Write the rows, small batches together; on bad rows nothing is left behind."""
    if "://" not in path:
        Path(path).mkdir(parents=True, exist_ok=True)
    written: list[Written] = []
    try:
        for rows in [reader.read_all()] if key else _coalesced(reader):
            checked = _checked(rows, rules, key, None)
            written += write_files(checked, path, rules.partition_columns, options)
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


def _by_deltalake(
    opened: DeltaTable,
    rows: pa.Table,
    path: str,
    mode: Mode,
    key: Sequence[str],
    where: str | None,
    txn: tuple[str, int] | None,
    options: dict[str, str] | None,
) -> None:
    since = opened.version()
    try:
        if mode == "merge":
            _merge(opened, rows, key, txn)
        else:
            commit: Any = write_deltalake  # its overloads tie predicate to one mode
            commit(
                opened,
                rows,
                mode="overwrite",
                predicate=where,
                commit_properties=properties_of(txn),
            )
    except CommitFailedError as e:
        newest = DeltaTable(path, storage_options=options)
        if reached(newest, txn):
            return
        raise conflict(newest, since, path) from e


def _check(mode: str, key: str | Sequence[str] | None, where: str | None) -> None:
    if mode not in ("append", "overwrite", "merge", "replace_where"):
        raise ValueError(f"mode {mode!r} is not append, overwrite, merge or replace_where")
    if (mode == "merge") != (key is not None):
        raise ValueError("key= names the identifying columns of mode='merge', and only of it")
    if (mode == "replace_where") != (where is not None):
        raise ValueError("where= is the condition of mode='replace_where', and only of it")


def _names(key: str | Sequence[str] | None) -> list[str]:
    return [key] if isinstance(key, str) else list(key or ())


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


def _merge(
    opened: DeltaTable, rows: pa.Table, key: Sequence[str], txn: tuple[str, int] | None
) -> None:
    condition = " AND ".join(f"target.`{n}` = source.`{n}`" for n in key)
    (
        opened.merge(
            rows,
            condition,
            source_alias="source",
            target_alias="target",
            commit_properties=properties_of(txn),
        )
        .when_matched_update_all()
        .when_not_matched_insert_all()
        .execute()
    )
