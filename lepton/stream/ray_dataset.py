"""The stream as a Ray Dataset, for Ray Data's consumers and for Ray Train's trainers.

Ray Train splits a dataset by calling its ``streaming_split``; this dataset answers with the
stream's own shards, so nothing is dropped or padded and ``ray.train.get_dataset_shard`` gives a
resumable :class:`lepton.stream.Shard`. Read as a plain Dataset, its rows come in global order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.data
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from lepton.stream.mixture import MixedShard, Mixture
from lepton.stream.ray_engine import coordinated_shards, quiet

if TYPE_CHECKING:
    from lepton.stream.shard import Shard
    from lepton.stream.stream import Stream

TASK_ROWS = 262_144


class StreamDataset(ray.data.Dataset):
    """A Ray Dataset that splits into exact shards."""

    stream: Stream | Mixture

    @staticmethod
    def copy(
        ds: ray.data.Dataset, _deep_copy: bool = False, _as: type | None = None
    ) -> ray.data.Dataset:
        """Copy as Ray does, and keep the stream."""
        copied = ray.data.Dataset.copy(ds, _deep_copy, _as)
        if isinstance(ds, StreamDataset) and isinstance(copied, StreamDataset):
            copied.stream = ds.stream
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"dataset": super().__getstate__(), "stream": self.stream}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state["dataset"])
        self.stream = state["stream"]

    def streaming_split(self, n: int, **options: Any) -> Sequence[Shard | MixedShard]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return one exact shard a rank; ``equal`` and locality hints do not apply."""
        if isinstance(self.stream, Mixture):
            return self.stream.shards(n)
        return coordinated_shards(self.stream, n)


class StepSource(Datasource):
    """Runs of steps as read tasks; each reads the windows that its steps touch."""

    def __init__(self, stream: Stream | Mixture) -> None:
        super().__init__()
        self._stream = stream.pinned()  # its steps are those of one version

    def get_name(self) -> str:
        """Name shown in Ray Data's plans."""
        return "LeptonSteps"

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown before reading."""
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        """Return tasks in global order, of about :data:`TASK_ROWS` rows each."""
        stream = self._stream
        plan = ray.put(stream)
        steps = stream.order(0).steps
        size = max(1, min(TASK_ROWS // stream.batch_size, -(-steps // max(1, parallelism))))
        return [
            ReadTask(
                _task(plan, epoch, first, min(first + size, steps)),
                BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None),
            )
            for epoch in range(stream.epochs)
            for first in range(0, steps, size)
        ]


def _task(plan: Any, epoch: int, first: int, last: int) -> Callable[[], Iterable[pa.Table]]:
    def read() -> Iterable[pa.Table]:
        stream: Any = ray.get(plan)
        here = stream.read_by("worker", stream.trace)
        shard = here.shard(0, 1, here.state_at(epoch, first))
        return [shard.next_part().rows for _ in range(first, last)]

    return read


def dataset_of(stream: Stream | Mixture) -> StreamDataset:
    """Return the stream's epochs as one dataset, rows in global order."""
    quiet()
    dataset = ray.data.read_datasource(StepSource(stream))
    dataset.context.execution_options.preserve_order = True
    found = ray.data.Dataset.copy(dataset, _as=StreamDataset)
    assert isinstance(found, StreamDataset)  # noqa: S101 - asked for one line above
    found.stream = stream
    return found
