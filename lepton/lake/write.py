"""Writing to Delta in one commit: all of it or none of it, and with ``txn`` only once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError

from lepton.errors import LakeError
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
        LakeError: the commit failed; nothing was written.
    """
    path = os.fspath(uri)
    _check(mode, key, where)
    options = dict(storage_options) if storage_options else None
    if txn is not None and _reached(path, txn, options):
        return table(path, storage_options=options)
    reader = _reader(data)
    properties = CommitProperties(app_transactions=[Transaction(*txn)] if txn else None)
    try:
        if mode == "merge" and DeltaTable.is_deltatable(path, options):
            _merge(reader, path, key, options, properties)
        else:
            commit: Any = write_deltalake  # its overloads tie predicate to one mode
            commit(
                path,
                reader,
                mode="append" if mode in ("append", "merge") else "overwrite",
                predicate=where,
                partition_by=list(partition_by) if partition_by else None,
                storage_options=options,
                commit_properties=properties,
            )
    except CommitFailedError as e:
        raise LakeError(f"another writer changed {path!r} meanwhile; nothing written: {e}") from e
    except (DeltaError, OSError, ValueError, pa.ArrowInvalid) as e:
        raise LakeError(f"cannot write to {path!r}; nothing was committed: {e}") from e
    return table(path, storage_options=options)


def _check(mode: str, key: str | Sequence[str] | None, where: str | None) -> None:
    if mode not in ("append", "overwrite", "merge", "replace_where"):
        raise ValueError(f"mode {mode!r} is not append, overwrite, merge or replace_where")
    if (mode == "merge") != (key is not None):
        raise ValueError("key= names the identifying columns of mode='merge', and only of it")
    if (mode == "replace_where") != (where is not None):
        raise ValueError("where= is the condition of mode='replace_where', and only of it")


def _reached(path: str, txn: tuple[str, int], options: dict[str, str] | None) -> bool:
    if not DeltaTable.is_deltatable(path, options):
        return False
    latest = DeltaTable(path, storage_options=options).transaction_version(txn[0])
    return latest is not None and latest >= txn[1]


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
    reader: pa.RecordBatchReader,
    path: str,
    key: str | Sequence[str] | None,
    options: dict[str, str] | None,
    properties: CommitProperties,
) -> None:
    names = [key] if isinstance(key, str) else list(key or ())
    condition = " AND ".join(f"target.`{n}` = source.`{n}`" for n in names)
    (
        DeltaTable(path, storage_options=options)
        .merge(
            reader,
            condition,
            source_alias="source",
            target_alias="target",
            commit_properties=properties,
        )
        .when_matched_update_all()
        .when_not_matched_insert_all()
        .execute()
    )
