"""A snapshot as a Ray Data source: one read task a data file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray.data
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from lepton.lake.log import DataFile
from lepton.lake.read import POSITION

if TYPE_CHECKING:
    from lepton.lake.snapshot import Snapshot


class _SnapshotSource(Datasource):
    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__()
        self._snapshot = snapshot

    def get_name(self) -> str:
        return "Lepton"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        snapshot = self._snapshot
        return [
            ReadTask(
                _reader(snapshot, file),
                BlockMetadata(
                    num_rows=None, size_bytes=None, input_files=(file.path,), exec_stats=None
                ),
                schema=snapshot.schema,
            )
            for file in snapshot.files()
        ]


def _reader(snapshot: Snapshot, file: DataFile) -> Callable[[], Iterable[pa.Table]]:
    return lambda: [snapshot.read_file(file).drop_columns(POSITION)]


def read_snapshot(snapshot: Snapshot) -> ray.data.Dataset:
    """Return the snapshot's rows as a lazy Dataset."""
    files = len(snapshot.files())
    if files == 0:
        return ray.data.from_arrow(snapshot.schema.empty_table())
    return ray.data.read_datasource(_SnapshotSource(snapshot), override_num_blocks=files)
