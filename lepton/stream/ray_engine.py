"""The ``ray_data`` engine: Ray Data's tasks read and transform units; order is preserved.

Each unit is one read task, followed by the transform as a ``map_batches`` of its own, which Ray
Data fuses or spreads as it sees fit. One *coordinator* actor per worker group runs the pipeline
and hands block references, not bytes, to the ranks, in the order in which steps want them. It
stops reading when a rank's queue is full, so memory stays bounded.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.data
import ray.exceptions
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.exceptions import RayTaskError

from lepton.errors import StreamError
from lepton.stream.cursor import Cursor
from lepton.stream.order import Order, Unit, lanes_of
from lepton.stream.reader import Source, read_unit, transformed
from lepton.stream.shard import Shard

if TYPE_CHECKING:
    from lepton.stream.stream import Stream

QUEUE_BLOCKS = 4
POLL_S = 0.2


@lru_cache(maxsize=4)
def _plan(ref: Any) -> tuple[Source, Order]:
    """Fetch a plan from the object store once per reading process."""
    return ray.get(ref)


class UnitSource(Datasource):
    """Units as a Ray Data source, one read task each, in the given order."""

    def __init__(self, source: Source, order: Order, units: list[Unit]) -> None:
        super().__init__()
        self._plan = ray.put((source, order))
        self._units = units

    def get_name(self) -> str:
        """Name shown in Ray Data's plans."""
        return "LeptonStream"

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown before reading."""
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        """Return one task a unit, whatever parallelism is asked for."""
        return [
            ReadTask(
                _task(self._plan, unit),
                BlockMetadata(
                    num_rows=unit.rows, size_bytes=None, input_files=None, exec_stats=None
                ),
            )
            for unit in self._units
        ]


def _task(plan: Any, unit: Unit) -> Callable[[], Iterable[pa.Table]]:
    def read() -> Iterable[pa.Table]:
        source, order = _plan(plan)
        return [read_unit(source, order, unit)]

    return read


def pipeline(source: Source, order: Order, units: list[Unit]) -> ray.data.Dataset:
    """Return the Ray Dataset that reads and transforms units, in order."""
    quiet()
    dataset = ray.data.read_datasource(
        UnitSource(source, order, units), override_num_blocks=len(units)
    )
    if source.transform is not None:
        plan = ray.put((source, order))

        def transform(rows: Any) -> Any:
            return transformed(rows, _plan(plan)[0].transform)

        dataset = dataset.map_batches(
            transform,
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
        )
    dataset.context.execution_options.preserve_order = True
    return dataset


def quiet() -> None:
    """Keep Ray Data's progress bars and per-execution log lines off the terminal."""
    import logging

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def _blocks(stream: Stream, pieces: Iterator[tuple[Order, Unit]]) -> Iterator[tuple[Unit, Any]]:
    """Run one pipeline an epoch; yield each block's reference with the unit it belongs to."""
    for _, group in groupby(pieces, key=lambda piece: piece[1].epoch):
        plans = list(group)
        units = [unit for _, unit in plans]
        at, left = 0, units[0].rows
        bundles = pipeline(stream.source, plans[0][0], units).iter_internal_ref_bundles()
        for bundle in bundles:
            for entry in bundle.blocks:
                rows = entry.metadata.num_rows
                yield units[at], entry.ref
                left -= rows or 0
                if left == 0 and at + 1 < len(units):
                    at += 1
                    left = units[at].rows


def read_on_cluster(
    stream: Stream, pieces: Iterator[tuple[Order, Unit]]
) -> Iterator[tuple[Unit, pa.Table]]:
    """Read units by Ray Data for this process alone, without a coordinator."""
    try:
        for unit, ref in _blocks(stream, pieces):
            yield unit, ray.get(ref)
    except RayTaskError as e:
        raise _stream_error(e) from None


class Coordinator:
    """Runs the pipeline for a worker group; an actor with one thread a rank and one to read."""

    def __init__(self, stream: Stream, world_size: int) -> None:
        self._stream = stream
        self._world_size = world_size
        self._lock = threading.Lock()
        self._start: Cursor | None = None
        self._queues: list[queue.Queue[tuple[Unit, Any] | None]] = []
        self._error: StreamError | None = None
        self._stop = threading.Event()

    def begin(self, cursor: Cursor) -> None:
        """Start reading from a cursor; every rank calls it with the same one.

        Raises:
            StreamError: the ranks disagree about where to begin.
        """
        with self._lock:
            if self._start == cursor:
                return
            if self._start is not None:
                raise StreamError(
                    f"ranks begin at different cursors ({self._start} and {cursor}): load the same "
                    "state on every rank before iterating"
                )
            self._start = cursor
            size = QUEUE_BLOCKS + self._stream.lane_count // self._world_size
            self._queues = [queue.Queue(size) for _ in range(self._world_size)]
            threading.Thread(target=self._read, args=(cursor,), daemon=True).start()

    def _read(self, cursor: Cursor) -> None:
        try:
            lanes = lanes_of(0, 1, self._stream.lane_count)
            for unit, ref in _blocks(self._stream, self._stream.pieces(lanes, cursor)):
                self._put(unit.lane % self._world_size, (unit, ref))
                if self._stop.is_set():
                    return
            for rank in range(self._world_size):
                self._put(rank, None)
        except Exception as e:  # noqa: BLE001 - whatever stops reading must reach the ranks
            self._error = _stream_error(e)

    def _put(self, rank: int, item: tuple[Unit, Any] | None) -> None:
        while not self._stop.is_set():
            try:
                return self._queues[rank].put(item, timeout=POLL_S)
            except queue.Full:
                continue
        return None

    def next(self, rank: int) -> tuple[Unit, list[Any]] | None:
        """Return the rank's next block as (unit, [reference]); None at the end.

        Raises:
            StreamError: reading failed.
        """
        while True:
            try:
                item = self._queues[rank].get(timeout=POLL_S)
            except queue.Empty:
                if self._error is not None:
                    raise self._error from None
                continue
            return None if item is None else (item[0], [item[1]])

    def stop(self) -> None:
        """End reading."""
        self._stop.set()


def _stream_error(error: BaseException) -> StreamError:
    """Find lepton's own error inside Ray's wrappers, or say what Ray said."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, StreamError) and not isinstance(inner, RayTaskError):
            return inner
        last, inner = inner, getattr(inner, "cause", None) or inner.__cause__
        if inner is None:
            error = last
    return StreamError(f"Ray Data could not deliver the stream: {type(error).__name__}: {error}")


def coordinated_shards(stream: Stream, world_size: int) -> list[Shard]:
    """Return one shard a rank, all fed by one coordinator actor on this node."""
    if stream.engine == "worker":
        return [stream.shard(rank, world_size) for rank in range(world_size)]
    actor = (
        ray.remote(Coordinator)
        .options(num_cpus=0, max_concurrency=world_size + 2)
        .remote(stream, world_size)
    )
    start = Cursor(order=stream.fingerprint)
    return [
        Shard(stream, rank, world_size, CoordinatedFeed(actor, rank), cursor=start)
        for rank in range(world_size)
    ]


class CoordinatedFeed:
    """The ranks' end of a coordinator: asks for one block ahead of the one in use."""

    def __init__(self, actor: Any, rank: int) -> None:
        self._actor = actor
        self._rank = rank

    def _next(self, asked: Any) -> tuple[Unit, list[Any]] | None:
        found: Any = ray.get(asked)
        return found

    def __call__(self, cursor: Cursor) -> Iterator[tuple[Unit, pa.Table]]:
        """Yield units and rows from a cursor on.

        Raises:
            StreamError: reading failed, or the coordinator died.
        """
        try:
            ray.get(self._actor.begin.remote(cursor))
            following = self._actor.next.remote(self._rank)
            while (found := self._next(following)) is not None:
                following = self._actor.next.remote(self._rank)
                unit, (ref,) = found
                yield unit, ray.get(ref)
        except RayTaskError as e:
            raise _stream_error(e) from None
        except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as e:
            raise StreamError(
                "the stream's coordinator died; start the run again by the same name and it goes "
                f"on from its last checkpoint ({type(e).__name__})"
            ) from e
