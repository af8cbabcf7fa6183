"""A stream: which rows, in which order, cut into which global batches. Immutable and picklable."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from lepton.errors import StreamError
from lepton.lake import Snapshot, table
from lepton.lake.log import DataFile
from lepton.lake.predicate import text_of
from lepton.lake.read import POSITION, bytes_per_row, group_sizes, stored_rows
from lepton.lake.snapshot import refuse_empty
from lepton.stream.assembly import Feed
from lepton.stream.columns import columns_of, is_list
from lepton.stream.cursor import Cursor, cursor_of
from lepton.stream.layout import MAX_CHUNK_ROWS, FileRows, fine_rows, layout_of, swelling_of
from lepton.stream.order import Digest, Ints, Layout, Order, Unit, digest_of, lanes_of
from lepton.stream.reader import Source, Transform, expected_rows, read_here, transformed
from lepton.stream.shard import Format, Shard
from lepton.stream.slabs import Nothing, Slabs, nothing_of
from lepton.telemetry import Carrier

if TYPE_CHECKING:
    import ray.data

Engine = Literal["auto", "worker", "ray_data"]

DEFAULT_LANES = 8
WINDOW_BYTES = 16 * 2**20
WINDOWS_BYTES = 64 * 2**20
"""A window's share of memory, and that of one window for each lane."""
AHEAD = 2
"""Windows that a rank reads ahead of the consumer."""
SMALL_BYTES = 64 * 2**20
"""A table up to this size is kept decoded by whoever reads it."""
FOOTER_THREADS = 16

SAMPLE_ROWS = 16
"""Rows from which a stream learns what its transform makes of them."""

_ORDERS = threading.Lock()
"""Held while the orders that a stream keeps change: its readers ask from several threads."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """A deterministic stream of global batches over a snapshot.

    Attributes:
        snapshot: which rows and columns.
        batch_size: rows of a global batch, over all ranks together.
        seed: decides the order, together with the epoch.
        epochs: passes over the rows.
        shuffle: False keeps the order by file and position (cut into lanes all the same).
        lanes: the most ranks that can share the stream, part of what decides the order; None is
            8, or the largest number of workers under :func:`lepton.train`.
        engine: who reads: ``worker`` (each rank, in threads), ``ray_data`` (Ray Data's tasks), or
            ``auto``. The order is the same.
        transform: a Preparation, or any function from an Arrow table to one with the same rows.
        follow: at each epoch's end, move to the table's newest version; default stay pinned.
        trace: the span under which reads are recorded; set by :func:`lepton.train`.

    Memory of a rank beyond its imports: about (lanes owned + 5) * w + 3 * max(4 MiB, batch), where
    w, a window, is at most twice min(16 MiB, 64 MiB / lanes), and batch this rank's part of a
    global batch; a table up to 64 MiB is kept decoded as a whole. Where types do not tell how large
    rows are, as with text, all this is by the table's first rows, within a factor of two.
    """

    snapshot: Snapshot
    batch_size: int
    seed: int = 0
    epochs: int = 1
    shuffle: bool = True
    lanes: int | None = None
    engine: Engine = "auto"
    transform: Transform | None = None
    follow: bool = False
    trace: Carrier | None = None
    _cache: dict[str, Any] = field(default_factory=dict[str, Any], init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs"):
            _positive(name, getattr(self, name))
        if self.lanes is not None:
            _positive("lanes", self.lanes)
        if self.engine not in ("auto", "worker", "ray_data"):
            raise ValueError(f"engine {self.engine!r} is not 'auto', 'worker' or 'ray_data'")
        if self.follow and self.engine == "ray_data":
            raise ValueError("follow=True is read by engine='worker': leave engine out")
        if self.transform is not None and not callable(self.transform):
            raise TypeError("transform must be callable: a Preparation, or table -> table")
        if self.batch_size < (self.lanes or 1):
            raise ValueError(
                f"batch_size={self.batch_size} is smaller than lanes={self.lanes}: every lane "
                "gives rows to every batch; lower lanes (the most workers) or raise batch_size"
            )

    @property
    def lane_count(self) -> int:
        """Lanes in use."""
        return self.lanes or min(DEFAULT_LANES, self.batch_size)

    def with_lanes(self, most_workers: int) -> Stream:
        """Return this stream with lanes for so many workers, unless they were given before.

        Lanes are a multiple of the workers, about 8: more lanes mix more files in a batch.

        Raises:
            ValueError: more workers than lanes, or a batch smaller than the lanes.
        """
        if self.lanes is None:
            each = min(DEFAULT_LANES, self.batch_size) // most_workers
            return replace(self, lanes=most_workers * max(1, each))
        if self.lanes < most_workers:
            raise ValueError(
                f"the stream has {self.lanes} lanes, too few for {most_workers} workers: "
                f"pass lanes={most_workers} or more to stream(...)"
            )
        return self

    def read_by(self, engine: Engine, trace: Carrier | None) -> Stream:
        """Return this stream with another reader; the plan made so far is kept."""
        changed = replace(self, engine=engine, trace=trace)
        changed._cache.update(self._cache)
        return changed

    def pinned(self) -> Stream:
        """Return this stream as one that does not follow its table; the plan is kept."""
        changed = replace(self, follow=False)
        changed._cache.update(self._cache)
        return changed

    @property
    def layout(self) -> Layout:
        """The chunks of the snapshot.

        Raises:
            LakeError: the snapshot has no rows.
        """
        if "layout" not in self._cache:
            self._cache["layout"] = self._plan()
        return self._cache["layout"]

    def _plan(self) -> Layout:
        snapshot = self.snapshot
        version, options = snapshot.load(), dict(snapshot.options)
        wanted = {f.path for f in snapshot.files()}
        files = [(i, f) for i, f in enumerate(version.files) if f.path in wanted]
        if not files:
            refuse_empty(snapshot)
        stored = {i: stored_rows(version, f, options) for i, f in files}
        columns = snapshot.schema.names
        total = sum(stored.values())
        size, decoded = bytes_per_row(version, files[0][1], columns, options)
        cut, swelling = self._cut(total, size), swelling_of(size, decoded)
        swollen = self._cut(total, size * swelling)
        same = (cut[0], cut[2]) == (swollen[0], swollen[2])
        alike = cut == swollen or (same and swollen[1] >= total)  # one window holds it all
        self._cache["swelling"] = 1 if alike else swelling
        chunk_rows, window_rows, fine = cut if alike else swollen
        groups = {} if fine else self._groups([(i, f) for i, f in files if stored[i] > chunk_rows])

        def described() -> Iterator[FileRows]:
            for (i, _), live in zip(files, self._positions(files), strict=True):
                yield FileRows(i, stored[i], None if isinstance(live, int) else live, groups.get(i))

        layout = layout_of(described(), chunk_rows, fine=fine, window_rows=window_rows)
        if layout.rows == 0:
            refuse_empty(snapshot)
        return layout

    def _cut(self, total: int, width: float) -> tuple[int, int, bool]:
        """Return the rows of a chunk and of a window, and whether the table counts as small."""
        window = min(WINDOW_BYTES, WINDOWS_BYTES // self.lane_count)
        window_rows = max(1, min(MAX_CHUNK_ROWS, int(window / max(1.0, width))))
        fine = total * max(1.0, width) <= SMALL_BYTES
        chunk_rows = min(window_rows, fine_rows(total, self.lane_count)) if fine else window_rows
        return chunk_rows, window_rows, fine

    def _positions(self, files: list[tuple[int, DataFile]]) -> Iterator[Ints | int]:
        """Each file's rows: read in threads, a few files ahead, where the log does not tell."""
        snapshot = self.snapshot
        if snapshot.predicate is None and not any(f.vector for _, f in files):
            yield from (snapshot.positions(f) for _, f in files)
            return
        asked: deque[Future[Ints | int]] = deque()
        with ThreadPoolExecutor(FOOTER_THREADS) as threads:
            for _, file in files:
                asked.append(threads.submit(snapshot.positions, file))
                if len(asked) > 2 * FOOTER_THREADS:
                    yield asked.popleft().result()
            while asked:
                yield asked.popleft().result()

    def _groups(self, files: list[tuple[int, DataFile]]) -> dict[int, Ints]:
        """Read the footers of files larger than a chunk: where their row groups end."""
        version, options = self.snapshot.load(), dict(self.snapshot.options)

        def sizes(numbered: tuple[int, DataFile]) -> tuple[int, Ints]:
            return numbered[0], group_sizes(version, numbered[1], options)

        with ThreadPoolExecutor(FOOTER_THREADS) as threads:
            return dict(threads.map(sizes, files))

    def order(self, epoch: int) -> Order:
        """Return the order of an epoch."""
        layout = self.layout
        with _ORDERS:
            orders: dict[int, Order] = self._cache.setdefault("orders", {})
            if epoch not in orders:
                for old in [e for e in orders if e != epoch - 1]:
                    del orders[old]
                orders[epoch] = Order(
                    layout=layout,
                    epoch=epoch,
                    batch_size=self.batch_size,
                    lanes=self.lane_count,
                    seed=self.seed,
                    version=self.snapshot.version,
                    shuffle=self.shuffle,
                )
            return orders[epoch]

    @property
    def steps(self) -> int:
        """Global batches over all epochs."""
        return self.order(0).steps * self.epochs

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the order depends on."""
        return self._hash(self.snapshot.version)

    @property
    def identity(self) -> str:
        """Hash of what a run keeps when it is resumed: the order, less a followed version."""
        return self._hash("newest") if self.follow else self.fingerprint

    def _hash(self, version: int | str) -> str:
        snapshot = self.snapshot
        what = [snapshot.load().table_id, version]
        what += [str(None) if snapshot.predicate is None else text_of(snapshot.predicate)]
        what += [self.seed, self.batch_size, self.lane_count, self.shuffle]
        what += [sorted(snapshot.schema.names)]
        if version != "newest":
            what += self._swollen()
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]

    def _swollen(self) -> list[int]:
        """Return what the plan's cuts depend on beyond the log and the footers, if they do."""
        _ = self.layout
        swelling = self._cache["swelling"]
        return [] if swelling == 1 else [swelling]

    def at(self, version: int) -> Stream:
        """Return this stream over another version of its table.

        Raises:
            LakeError: no such version, or it lacks the stream's columns.
        """
        snapshot = self.snapshot
        if version == snapshot.version:
            return self
        other = table(snapshot.uri, version=version, storage_options=dict(snapshot.options))
        other = other.select(snapshot.schema.names)
        if snapshot.predicate is not None:
            other = other.where(snapshot.predicate)
        return replace(self, snapshot=other)

    def newest(self) -> int:
        """Return the newest version of the table."""
        snapshot = self.snapshot
        return table(snapshot.uri, storage_options=dict(snapshot.options)).version

    @property
    def source(self) -> Source:
        """What a reader needs."""
        return Source(snapshot=self.snapshot, transform=self.transform, carrier=self.trace)

    @property
    def nothing(self) -> Nothing:
        """A batch of no rows: what the table's first rows are like, transformed, less the rows.

        A transform need not be able to do anything with no rows: it is called on none only if
        there are none.
        """
        if "nothing" not in self._cache:
            rows = self._sample()
            if self.transform is not None:
                rows, _ = transformed(rows, self.transform)
            columns = {name: c.picked(0, len(rows)) for name, c in columns_of(rows, None)}
            self._cache["nothing"] = nothing_of(columns, rows.schema)
        return self._cache["nothing"]

    def _sample(self) -> pa.Table:
        """Return a few rows, where types do not tell what a row is like."""
        snapshot = self.snapshot
        if self.transform is None and not any(is_list(f.type) for f in snapshot.schema):
            return snapshot.schema.empty_table()
        first = [snapshot.read_file(f, stop=SAMPLE_ROWS) for f in snapshot.files()[:1]]
        found = [rows.drop_columns(POSITION) for rows in first if len(rows)]
        return found[0] if found else snapshot.head(SAMPLE_ROWS)

    @property
    def schema(self) -> pa.Schema:
        """Of the batches, in Arrow's types."""
        return self.nothing.schema

    def check_cursor(self, cursor: Cursor) -> None:
        """Raise StreamError unless the cursor belongs to this stream's order."""
        if cursor.order and cursor.order != self.fingerprint:
            raise StreamError(
                f"the cursor is of another order than {self.snapshot} with batch_size="
                f"{self.batch_size}, seed={self.seed}, lanes={self.lane_count}: resume with the "
                "same table version, filter, batch size, seed and lanes, or start a new run"
            )
        if cursor.rows >= self.order(0).rows and cursor.epoch < self.epochs:
            raise StreamError(f"{cursor} lies beyond the epoch's {self.order(0).rows} rows")

    def started(self, cursor: Cursor) -> tuple[Stream, Cursor]:
        """Return the stream at a cursor's version of the table, and the cursor as its own.

        Raises:
            StreamError: the cursor is of another order, or of another version and this stream
                does not follow its table.
        """
        version = cursor.version
        if version is not None and version != self.snapshot.version and not self.follow:
            raise StreamError(
                f"the cursor is of version {version}, and the stream is pinned to {self.snapshot}: "
                f"resume with lepton.table(..., version={version}).stream(...), or with "
                "follow=True, as the stream that it comes from"
            )
        here = self if version is None else self.at(version)
        here.check_cursor(cursor)
        own = here.snapshot.version if self.follow else None
        return here, replace(cursor, order=here.fingerprint, version=own)

    def shard(
        self,
        rank: int,
        world_size: int,
        cursor: Mapping[str, Any] | Cursor | str | None = None,
        *,
        format: Format = "torch",  # noqa: A002 - the field's word for it
    ) -> Shard:
        """Return one rank's part.

        Args:
            rank: from 0.
            world_size: how many ranks share the stream, at most its lanes.
            cursor: a shard's ``state_dict()``, of any rank at any world size.
            format: ``torch`` for dicts of tensors, ``arrow`` for Arrow tables, or a function
                that makes a batch of an Arrow table (a collate function).

        Raises:
            ValueError: rank or world size do not fit.
            StreamError: the cursor is of another order, or of another version.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), not {rank}")
        if world_size > self.lane_count:
            raise ValueError(
                f"{world_size} ranks cannot share {self.lane_count} lanes: pass lanes={world_size}"
            )
        here, start = self.started(Cursor() if cursor is None else cursor_of(cursor))
        feed = here.feed(rank, world_size)
        return Shard(here, rank, world_size, feed, cursor=start, batch_format=format)

    def feed(self, rank: int, world_size: int) -> Feed:
        """Return what reads a rank's units."""
        lanes = lanes_of(rank, world_size, self.lane_count)

        def read(at: Cursor, slabs: Slabs) -> Iterator[object]:
            pieces = self.pieces(lanes, at)
            if self.engine == "ray_data":
                from lepton.stream.ray_engine import read_on_cluster

                return read_on_cluster(self, pieces, slabs)
            return read_here(self.source, pieces, slabs, ahead=AHEAD)

        return read

    def state_at(self, epoch: int, step: int) -> dict[str, Any]:
        """Return the state of every shard before a step."""
        return Cursor(epoch, step * self.batch_size, self.fingerprint).to_dict()

    def pieces(self, lanes: range, at: Cursor) -> Iterator[tuple[Order, Unit]]:
        """Yield the units of some lanes from a cursor to the end, as steps want them."""
        for epoch in range(at.epoch, self.epochs):
            order = self.order(epoch)
            for unit in order.units(lanes, at.rows if epoch == at.epoch else 0):
                yield order, unit

    def expected(self, epoch: int) -> Digest:
        """Return the order hash that an epoch must have, from the plan."""
        order = self.order(epoch)
        total = Digest()
        for unit in order.units(range(self.lane_count)):
            slots = order.slots(unit.lane, unit.offset, unit.rows)
            total += digest_of(slots, expected_rows(self.source, order, unit))
        return total

    def as_ray_dataset(self) -> ray.data.Dataset:
        """Return the epochs as one Ray Dataset whose rows come in exactly this order.

        Given to a Ray Train trainer (``datasets={"train": stream.as_ray_dataset()}``),
        ``ray.train.get_dataset_shard("train")`` is this stream's :class:`Shard` of the worker.
        """
        from lepton.stream.ray_dataset import dataset_of

        return dataset_of(self)

    def __call__(self) -> ray.data.Dataset:
        """Ray Train takes a function that makes a dataset: ``datasets={"train": stream}`` works."""
        return self.as_ray_dataset()


def _positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
