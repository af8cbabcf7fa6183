"""A snapshot as a Ray Data source: small files share a read task, big files are cut.

A task carries its own files and the table's schema, not the table: no log is replayed in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray.data
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from lepton.lake.log import DataFile, Version
from lepton.lake.read import POSITION
from lepton.lake.statistics import sizes_of

if TYPE_CHECKING:
    from lepton.lake.snapshot import Snapshot

TASKS = 200
"""Tasks worth having, as far as the smallest size allows."""
SMALLEST, LARGEST = 2**20, 2**26
"""Stored bytes that are enough for a task, however many files; and that are enough at any rate."""
EXPANSION = 3
"""Arrow bytes for a stored byte, a guess: Ray plans memory with it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Stored positions [start, stop) of a file; None is its end. Bytes are stored bytes."""

    file: DataFile
    start: int
    stop: int | None
    size: int

    @property
    def rows(self) -> int | None:
        """Live rows, where the log alone tells."""
        if self.stop is None and self.start == 0:
            return self.file.live
        if self.file.rows is None or self.file.vector is not None:
            return None
        return (self.file.rows if self.stop is None else self.stop) - self.start


def plan(files: Sequence[tuple[DataFile, int]]) -> list[list[Piece]]:
    """Cut (file, bytes) pairs into tasks of like size, in order."""
    total = sum(size for _, size in files)
    target = min(max(total // TASKS, SMALLEST), LARGEST)
    tasks: list[list[Piece]] = []
    filled = target
    for piece in (p for file, size in files for p in _cut(file, size)):
        if filled >= target:
            tasks.append([])
            filled = 0
        tasks[-1].append(piece)
        filled += piece.size
    return tasks


def _cut(file: DataFile, size: int) -> Iterator[Piece]:
    count = size // (2 * LARGEST) if file.rows else 0
    if count < 2 or not file.rows:
        yield Piece(file, 0, None, size)
        return
    edges = [file.rows * i // count for i in range(count + 1)]
    for start, stop in pairwise(edges):
        yield Piece(file, start, stop, size // count)


class _SnapshotSource(Datasource):
    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__()
        version = snapshot.load()
        sizes = sizes_of(version)
        self._snapshot = snapshot
        self._version = version.without_files()
        self._schema = snapshot.schema
        self._tasks = plan([(f, sizes.get(f.path, 0)) for f in snapshot.files()])

    def get_name(self) -> str:
        return "Lepton"

    @property
    def tasks(self) -> int:
        """Number of read tasks."""
        return len(self._tasks)

    def estimate_inmemory_data_size(self) -> int | None:
        return EXPANSION * sum(piece.size for task in self._tasks for piece in task)

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        return [self._read_task(task) for task in self._tasks]

    def _read_task(self, task: list[Piece]) -> ReadTask:
        counts = [piece.rows for piece in task]
        known = [c for c in counts if c is not None]
        exact = len(known) == len(task) and self._snapshot.predicate is None
        metadata = BlockMetadata(
            num_rows=sum(known) if exact else None,
            size_bytes=EXPANSION * sum(piece.size for piece in task),
            input_files=tuple(dict.fromkeys(piece.file.path for piece in task)),
            exec_stats=None,
        )
        return ReadTask(_reader(self._snapshot, self._version, task), metadata, schema=self._schema)


def _reader(
    snapshot: Snapshot, version: Version, task: list[Piece]
) -> Callable[[], Iterable[pa.Table]]:
    def read() -> Iterator[pa.Table]:
        for piece in task:
            rows = snapshot.read_part(version, piece.file, start=piece.start, stop=piece.stop)
            yield rows.drop_columns(POSITION)

    return read


def read_snapshot(snapshot: Snapshot) -> ray.data.Dataset:
    """Return the snapshot's rows as a lazy Dataset."""
    source = _SnapshotSource(snapshot)
    if source.tasks == 0:
        return ray.data.from_arrow(snapshot.schema.empty_table())
    return ray.data.read_datasource(source, override_num_blocks=source.tasks)
