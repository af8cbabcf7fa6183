"""The ``ray_data`` engine: Ray Data's tasks read and transform units; order is preserved.

Units that one rank wants one after another are read by one task, transformed, and delivered as one
block, the rows in order. One *coordinator* actor per worker group runs the pipeline and hands
block references, not bytes, to the ranks, in the order in which steps want them. It stops reading
when a rank's queue is full, so memory stays bounded.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.exceptions
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.exceptions import RayTaskError

from lepton.errors import StreamError
from lepton.stream.columns import columns_of
from lepton.stream.cursor import Cursor, cursor_of
from lepton.stream.order import Ints, Layout, Order, Unit, lanes_of
from lepton.stream.reader import ROW, Reader, Source, expected_rows
from lepton.stream.shard import Shard
from lepton.stream.slabs import Rows, Slabs

if TYPE_CHECKING:
    from lepton.stream.stream import Stream

QUEUE_BLOCKS = 2
POLL_S = 0.2
BUNDLE_UNITS = 4
"""Units in a block where there is no transform to spread: fewer blocks, less for Ray to do."""

Bundle = tuple[Unit, ...]
"""Units of one rank, delivered as one block."""


@lru_cache(maxsize=4)
def _plan(ref: Any) -> tuple[Reader, Order]:
    """Fetch a plan from the object store once per reading process."""
    source, order = ray.get(ref)
    return Reader(source), order


class UnitSource(Datasource):
    """Bundles of units as a Ray Data source, one read task each, in the given order."""

    def __init__(self, source: Source, order: Order, bundles: Sequence[Bundle]) -> None:
        super().__init__()
        self._plan = ray.put((source, order))
        self._bundles = bundles

    def get_name(self) -> str:
        """Name shown in Ray Data's plans."""
        return "LeptonStream"

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown before reading."""
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        """Return one task a bundle, whatever parallelism is asked for."""
        return [
            ReadTask(
                _task(self._plan, bundle),
                BlockMetadata(
                    num_rows=sum(u.rows for u in bundle),
                    size_bytes=None,
                    input_files=None,
                    exec_stats=None,
                ),
            )
            for bundle in self._bundles
        ]


def _task(plan: Any, bundle: Bundle) -> Callable[[], Iterable[pa.Table]]:
    def read() -> Iterable[pa.Table]:
        reader, order = _plan(plan)
        return [block_of([reader.read(order, unit) for unit in bundle])]

    return read


def block_of(units: Sequence[Rows]) -> pa.Table:
    """Return units' rows, in order, as one table; the last column says which rows they are.

    :data:`ROW` holds the identity of each row. Where a transform dropped rows, it holds the rows'
    places in the bundle instead, as a 32-bit column, and a unit of which nothing is left sends one
    row of place -1, so that every task delivers a block.
    """
    drops = any(rows.at is not None for rows in units)
    tables: list[pa.Table] = []
    begin = 0
    for rows in units:
        count = rows.count if rows.at is None else len(rows.at)
        arrays = [c.arrow(0, count) for c in rows.columns.values()]
        table = pa.Table.from_arrays(arrays, schema=rows.schema)
        if drops:
            at = np.arange(rows.count) if rows.at is None else rows.at
            marks = pa.array((at + begin).astype(np.int32))
        else:
            marks = pa.array(rows.identities(0, rows.count))
        tables.append(table.append_column(ROW, marks))
        begin += rows.count
    whole = pa.concat_tables(tables)
    return _nothing(whole.schema) if drops and len(whole) == 0 else whole


def _nothing(schema: pa.Schema) -> pa.Table:
    none: Any = pa.nulls
    arrays = [none(1, f.type) for f in schema]
    arrays[schema.get_field_index(ROW)] = pa.array([-1], pa.int32())
    return pa.Table.from_arrays(arrays, names=schema.names)


def rows_of(source: Source, order: Order, bundle: Bundle, block: pa.Table) -> Iterator[Rows]:
    """Take a block apart into the rows of its units."""
    marks: Ints = block[ROW].to_numpy()
    table = block.drop_columns(ROW)
    begin = 0
    for unit in bundle:
        if block.schema.field(ROW).type == pa.int64():
            low, high, at = begin, begin + unit.rows, None
            ids = _Slice(marks[low:high])
        else:
            low, high = (int(i) for i in np.searchsorted(marks, (begin, begin + unit.rows)))
            at = marks[low:high].astype(np.int64) - begin
            ids = _Planned(source, order, unit)
        columns = dict(columns_of(table.slice(low, high - low), None))
        yield Rows(table.schema, at, unit.rows, ids, columns)
        begin += unit.rows


class _Slice:
    """Identities that came with the rows."""

    def __init__(self, ids: Ints) -> None:
        self._ids = ids

    def __call__(self, low: int, high: int) -> Ints:
        return self._ids[low:high]


class _Planned:
    """Identities of a unit of which a transform dropped rows, from the plan."""

    def __init__(self, source: Source, order: Order, unit: Unit) -> None:
        self._what = (source, order, unit)
        self._ids: Ints | None = None

    def __call__(self, low: int, high: int) -> Ints:
        if self._ids is None:
            self._ids = expected_rows(*self._what)
        return self._ids[low:high]


def bundles_of(layout: Layout, units: Iterable[Unit], world_size: int, most: int) -> list[Bundle]:
    """Group units into blocks, in the order in which steps want them.

    Units of one rank go together; where row groups are read in parts, those of one lane do, so
    that one decoder reads them.
    """
    parts = len(layout.block) > 0 and int(layout.block[-1]) + 1 < len(layout.block)
    by_owner: dict[int, list[Unit]] = {}
    for unit in units:
        by_owner.setdefault(unit.lane if parts else unit.lane % world_size, []).append(unit)
    found = [
        tuple(owned[i : i + most])
        for owned in by_owner.values()
        for i in range(0, len(owned), most)
    ]
    return sorted(found, key=lambda b: (b[0].need, b[0].lane))


def pipeline(source: Source, order: Order, bundles: Sequence[Bundle]) -> ray.data.Dataset:
    """Return the Ray Dataset that reads and transforms bundles, one block each, in order."""
    quiet()
    dataset = ray.data.read_datasource(
        UnitSource(source, order, bundles), override_num_blocks=len(bundles)
    )
    dataset.context.execution_options.preserve_order = True
    dataset.context.target_max_block_size = None  # a block is a bundle, never a part of one
    return dataset


def quiet() -> None:
    """Keep Ray Data's progress bars and per-execution log lines off the terminal."""
    import logging

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def _blocks(
    stream: Stream, pieces: Iterator[tuple[Order, Unit]], world_size: int
) -> Iterator[tuple[Bundle, Any]]:
    """Run one pipeline an epoch; yield each block's reference with the units in it."""
    most = BUNDLE_UNITS if stream.transform is None else 1
    for _, group in groupby(pieces, key=lambda piece: piece[1].epoch):
        plans = list(group)
        order = plans[0][0]
        bundles = bundles_of(order.layout, (unit for _, unit in plans), world_size, most)
        waiting = iter(bundles)
        blocks = pipeline(stream.source, order, bundles).iter_internal_ref_bundles()
        for block in (entry for each in blocks for entry in each.blocks):
            yield next(waiting), block.ref


def read_on_cluster(
    stream: Stream, pieces: Iterator[tuple[Order, Unit]], slabs: Slabs
) -> Iterator[None]:
    """Read units by Ray Data for this process alone, without a coordinator."""
    try:
        for bundle, ref in _blocks(stream, pieces, 1):
            yield _lay(stream, bundle, ray.get(ref), slabs)
    except RayTaskError as e:
        raise _stream_error(e) from None


def _lay(stream: Stream, bundle: Bundle, block: Any, slabs: Slabs) -> None:
    order = stream.order(bundle[0].epoch)
    for unit, rows in zip(bundle, rows_of(stream.source, order, bundle, block), strict=True):
        slabs.lay(order, unit, replace(rows, columns={}), iter(rows.columns.items()))


@dataclass
class _Reading:
    """One run of the pipeline: from a cursor, for the ranks of one generation."""

    generation: int
    start: Cursor
    queues: list[queue.Queue[tuple[Bundle, Any] | None]]
    stop: threading.Event = field(default_factory=threading.Event)
    error: StreamError | None = None


class Coordinator:
    """Runs the pipeline for a worker group; an actor with one thread a rank and one to read.

    Workers that change in number begin again as another *generation*: the pipeline of the one
    before ends, and whoever still asks for its blocks is told so.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._reading: _Reading | None = None

    def ready(self) -> None:
        """Return once the actor runs."""
        _ = self._stream.order(0)

    def begin(self, cursor: Cursor, world_size: int, generation: int) -> None:
        """Start reading from a cursor; every rank calls it with the same one.

        Raises:
            StreamError: the ranks disagree about where to begin, or begin too late.
        """
        with self._lock:
            now = self._reading
            if now is not None and now.generation >= generation:
                if now.error is not None:
                    raise now.error
                if now.generation == generation and now.start == cursor:
                    return
                raise StreamError(
                    f"ranks begin at different cursors ({now.start} and {cursor}): load the same "
                    "state on every rank before iterating"
                )
            if now is not None:
                now.stop.set()
            size = QUEUE_BLOCKS + self._stream.lane_count // world_size
            queues = [queue.Queue[tuple[Bundle, Any] | None](size) for _ in range(world_size)]
            self._reading = _Reading(generation, cursor, queues)
            threading.Thread(target=self._read, args=(self._reading,), daemon=True).start()

    def _read(self, reading: _Reading) -> None:
        world_size = len(reading.queues)
        try:
            lanes = lanes_of(0, 1, self._stream.lane_count)
            pieces = self._stream.pieces(lanes, reading.start)
            for bundle, ref in _blocks(self._stream, pieces, world_size):
                _put(reading, bundle[0].lane % world_size, (bundle, ref))
                if reading.stop.is_set():
                    return
            for rank in range(world_size):
                _put(reading, rank, None)
        except Exception as e:  # noqa: BLE001 - whatever stops reading must reach the ranks
            reading.error = _stream_error(e)

    def next(self, rank: int, generation: int) -> tuple[Bundle, list[Any]] | None:
        """Return the rank's next block as (units, [reference]); None at the end.

        Raises:
            StreamError: reading failed, or another generation reads now.
        """
        reading = self._reading
        while reading is not None and reading.generation == generation:
            if reading.stop.is_set():
                break
            try:
                item = reading.queues[rank].get(timeout=POLL_S)
            except queue.Empty:
                if reading.error is not None:
                    raise reading.error from None
                continue
            return None if item is None else (item[0], [item[1]])
        raise StreamError("the workers have changed: another generation reads this stream now")

    def stop(self) -> None:
        """End reading."""
        if self._reading is not None:
            self._reading.stop.set()


def _put(reading: _Reading, rank: int, item: tuple[Bundle, Any] | None) -> None:
    while not reading.stop.is_set():
        try:
            return reading.queues[rank].put(item, timeout=POLL_S)
        except queue.Full:
            continue
    return None


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
    hosted = Hosted(stream, world_size)
    return [hosted.shard(rank, world_size) for rank in range(world_size)]


class Hosted:
    """A stream with its coordinator: what workers whose number changes open their shards from.

    Args:
        stream: the rows; read by the ranks themselves if its engine is ``worker`` or it follows
            its table.
        most: ranks at the most.
    """

    def __init__(self, stream: Stream, most: int) -> None:
        _ = stream.layout  # planned once, here, and sent along
        self._stream = stream
        self._actor: Any = None
        if stream.engine == "worker" or stream.follow:  # which is read by the ranks themselves
            return
        self._actor = (
            ray.remote(Coordinator).options(num_cpus=0, max_concurrency=2 * most + 4).remote(stream)
        )
        ray.get(self._actor.ready.remote())  # its imports are done, and it is known to run

    def shard(
        self,
        rank: int,
        world_size: int,
        cursor: Mapping[str, Any] | None = None,
        *,
        generation: int = 0,
    ) -> Shard:
        """Return a rank's shard; a higher generation ends the reading of the one before.

        Raises:
            StreamError: the cursor is of another order.
        """
        stream = self._stream
        if self._actor is None:
            return stream.shard(rank, world_size, cursor)
        stream, start = stream.started(Cursor() if cursor is None else cursor_of(cursor))
        feed = CoordinatedFeed(self._actor, rank, world_size, stream, generation)
        return Shard(stream, rank, world_size, feed, cursor=start)


class CoordinatedFeed:
    """The ranks' end of a coordinator: asks for one block ahead of the one in use."""

    def __init__(
        self, actor: Any, rank: int, world_size: int, stream: Stream, generation: int
    ) -> None:
        self._actor = actor
        self._rank = rank
        self._world_size = world_size
        self._stream = stream
        self._generation = generation

    def _next(self, asked: Any) -> tuple[Bundle, list[Any]] | None:
        found: Any = ray.get(asked)
        return found

    def __call__(self, cursor: Cursor, slabs: Slabs) -> Iterator[None]:
        """Lay the rank's units from a cursor on; yield after each block.

        Raises:
            StreamError: reading failed, or the coordinator died.
        """
        try:
            ray.get(self._actor.begin.remote(cursor, self._world_size, self._generation))
            following = self._actor.next.remote(self._rank, self._generation)
            while (found := self._next(following)) is not None:
                following = self._actor.next.remote(self._rank, self._generation)
                bundle, (ref,) = found
                yield _lay(self._stream, bundle, ray.get(ref), slabs)
        except RayTaskError as e:
            raise _stream_error(e) from None
        except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as e:
            raise StreamError(
                "the stream's coordinator died; start the run again by the same name and it goes "
                f"on from its last checkpoint ({type(e).__name__})"
            ) from e
