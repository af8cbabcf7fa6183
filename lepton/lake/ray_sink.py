"""A Ray Dataset as data files: written by Ray's tasks where the rows are, and not committed.

The caller commits what comes back. A task that is killed and tried again gives its files new
names, and only the try that ends is told of, so no row is there twice. What a job that fails had
written is found by the job's name in the names of its files, and removed.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import Datasink
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import WriteResult

from lepton.errors import LakeError
from lepton.lake.commit import sweep
from lepton.lake.files import FILE_BYTES, Written, write_files
from lepton.lake.rows import align, check_names, check_rows
from lepton.lake.rules import Rules

BUNDLE_BYTES = 64 * 2**20
"""Arrow bytes that are worth a write task: smaller blocks are written together."""


def schema_of(data: ray.data.Dataset) -> pa.Schema:
    """Return the Arrow schema of a Dataset; its first block may be computed for it.

    Raises:
        LakeError: it has no rows, and so no schema.
    """
    known = data.schema()
    base: Any = None if known is None else known.base_schema
    if isinstance(base, pa.Schema):
        return base
    batches: Any = data.limit(1).iter_batches(batch_format="pyarrow")
    first = next(iter(batches), None)
    if first is None:
        raise LakeError("the Ray Dataset has no rows, so it has no schema to write")
    return first.schema


def write_dataset(
    data: ray.data.Dataset, rules: Rules, uri: str, options: Mapping[str, str] | None
) -> list[Written]:
    """Write a Dataset's rows as data files in Ray tasks; nothing is committed.

    Raises:
        LakeError: rows do not fit, or a task failed for good; no file is left behind.
    """
    job = f"{uuid.uuid4().hex}-"
    sink = _Files(rules, uri, dict(options) if options else None, job)
    try:
        data.write_datasink(sink)
    except BaseException as e:
        sweep(job, uri, options)
        told = cause_of(e)
        if told is not None:
            raise LakeError(str(told)) from e
        if isinstance(e, Exception):
            raise LakeError(f"writing the Ray Dataset failed: {e}") from e
        raise
    if sink.rows == 0:
        raise LakeError("the Ray Dataset has no rows, so it has no schema to write")
    return sink.written


class _Files(Datasink[list[Written]]):
    """Writes blocks, small ones together, and keeps what was written."""

    def __init__(self, rules: Rules, uri: str, options: dict[str, str] | None, job: str) -> None:
        self._rules = rules
        self._uri = uri
        self._options = options
        self._job = job
        self.rows = 0
        self.written: list[Written] = []

    @property
    def min_bytes_per_write(self) -> int:
        return BUNDLE_BYTES

    def get_name(self) -> str:
        return "Lepton"

    def on_write_start(self, schema: pa.Schema | None = None) -> None:
        """Refuse columns that the table does not have, before any task writes."""
        if isinstance(schema, pa.Schema):
            check_names(schema.names, self._rules.schema)

    def write(self, blocks: Iterable[Block], ctx: Any) -> list[Written]:
        rules, written = self._rules, list[Written]()
        for rows in _joined(blocks):
            aligned = align(rows, rules.schema)
            check_rows(aligned, rules.schema, rules.constraints)
            columns, fields = rules.partition_columns, rules.stored
            written += write_files(
                aligned, self._uri, columns, self._options, job=self._job, fields=fields
            )
        return written

    def on_write_complete(self, write_result: WriteResult[list[Written]]) -> None:
        self.rows = write_result.num_rows
        self.written = [w for one in write_result.write_returns for w in one or ()]


def _joined(blocks: Iterable[Block]) -> Iterator[pa.Table]:
    """Tables of about as many bytes as a file may have, at least one block each."""
    held: list[pa.Table] = []
    for block in blocks:
        table: Any = BlockAccessor.for_block(block).to_arrow()
        if len(table) == 0:
            continue
        if held and (held[0].schema != table.schema or _bytes(held) >= FILE_BYTES):
            yield pa.concat_tables(held)
            held = []
        held.append(table)
    if held:
        yield pa.concat_tables(held)


def _bytes(tables: list[pa.Table]) -> int:
    return sum(t.nbytes for t in tables)


def cause_of(e: BaseException) -> LakeError | None:
    """The LakeError that a task failed with, wherever Ray put it."""
    seen: set[int] = set()
    waiting: list[Any] = [e]
    while waiting:
        at = waiting.pop()
        if at is None or id(at) in seen:
            continue
        if type(at) is LakeError:
            return at
        seen.add(id(at))
        waiting += [getattr(at, n, None) for n in ("cause", "__cause__", "__context__")]
    return None
