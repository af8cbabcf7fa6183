"""Reading units: the rows a plan names, in the plan's order, each with its identity.

Both engines read with :class:`Reader`; they differ in where it runs.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from lepton import telemetry
from lepton.errors import LakeError, StreamError
from lepton.lake import Snapshot
from lepton.lake.predicate import columns_read
from lepton.lake.read import OpenFile
from lepton.stream.columns import Column, columns_of
from lepton.stream.order import Ints, Order, Piece, Unit, row_ids
from lepton.stream.slabs import Rows, Slabs
from lepton.telemetry import Carrier, Few

ROW = "__row__"
"""Name of the int64 column by which a transform that drops rows says which it kept."""

Transform = Callable[[pa.Table], pa.Table]
Columns = Iterator[tuple[str, Column]]

THREADS = 2
OPEN_FILES, OPEN_REMOTE_FILES = 64, 16
"""Those of an object store keep what they have fetched."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is needed to read any unit: picklable, sent once to every reader."""

    snapshot: Snapshot
    transform: Transform | None
    carrier: Carrier | None = None


@dataclass(frozen=True, slots=True)
class _Identities:
    """Identities of planned rows, worked out when asked for: few consumers want them."""

    pieces: Sequence[Ints | int]
    counts: Sequence[int]
    order: Ints

    def __call__(self, low: int, high: int) -> Ints:
        picked = self.order[low:high]
        if len(self.pieces) == 1:
            ids = self.pieces[0]
            return ids + picked if isinstance(ids, int) else ids[picked]
        return self.laid_out()[picked]

    def laid_out(self) -> Ints:
        """Identities of the window's rows before they are permuted."""
        return np.concatenate(
            [
                ids + np.arange(count) if isinstance(ids, int) else ids
                for ids, count in zip(self.pieces, self.counts, strict=True)
            ]
        )


class Reader:
    """Reads units in one process. Keeps files open, and a small table's files decoded."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._few = Few()
        snapshot = source.snapshot
        self._version = snapshot.load()
        self._wanted = list(snapshot.schema.names)
        predicate, by_row = snapshot.predicate, set[str]()
        if predicate is not None:
            by_row = set(columns_read(predicate, self._version.schema))
        self._filters = bool(by_row - set(self._version.partition_columns))
        self._needed = [*self._wanted, *sorted(by_row - set(self._wanted))]
        self._options = dict(snapshot.options)
        self._open: OrderedDict[tuple[int, Any], OpenFile] = OrderedDict()
        self._whole: dict[int, tuple[pa.Table, Ints | None]] = {}
        self._most = OPEN_REMOTE_FILES if "://" in self._version.uri else OPEN_FILES
        self._lock = threading.Lock()
        self._locks: dict[Any, threading.Lock] = {}
        self._drops = False

    def read(self, order: Order, unit: Unit) -> Rows:
        """Return the rows of a unit, transformed.

        Raises:
            StreamError: a file of the table cannot be read, or the transform is wrong.
        """
        with self._told(unit) as told:
            rows, columns = self._begun(order, unit)
            return replace(rows, columns=dict(told(columns)))

    def lay(self, order: Order, unit: Unit, slabs: Slabs) -> None:
        """Read a unit and put its rows where they belong.

        Raises:
            StreamError: a file of the table cannot be read, or the transform is wrong.
        """
        with self._told(unit) as told:
            rows, columns = self._begun(order, unit)
            slabs.lay(order, unit, rows, told(columns))

    @contextmanager
    def _told(self, unit: Unit) -> Generator[Callable[[Columns], Columns]]:
        """Explain errors; trace and measure what passes through the function that is given."""
        began, size = time.time_ns(), 0

        def counted(columns: Columns) -> Columns:
            nonlocal size
            for name, column in columns:
                size += column.values.nbytes
                yield name, column

        try:
            yield counted
        except LakeError as e:
            raise StreamError(
                f"the stream stops in epoch {unit.epoch}: {e}; nothing is lost: mend the table or "
                "the file and go on from the last state_dict() or checkpoint"
            ) from e
        if self.source.carrier is not None:
            _trace(self.source.carrier, began, unit, self._few.take(time.monotonic()))
        if telemetry.measuring():
            telemetry.measure("lepton.read.rows", unit.rows)
            telemetry.measure("lepton.read.size", size)

    def _begun(self, order: Order, unit: Unit) -> tuple[Rows, Columns]:
        """Return what is known of a unit's rows, and the columns that are read as they are asked.

        Row groups that are wanted whole are read column by column, each put in order while it is
        in the cache.
        """
        pieces = order.window_pieces(unit.lane, unit.window)
        picked = order.window_rows(unit.lane, unit.window)[unit.low : unit.high]
        take = picked if order.shuffle or unit.low else None
        if len(pieces) == 1 and self._in_whole_groups(order, unit.lane, pieces[0]):
            chunk, low, high = pieces[0]
            start = int(order.layout.start[chunk])
            first = row_ids(int(order.layout.file[chunk]), np.array(start + low, np.int64))
            ids = _Identities([int(first)], [high - low], picked)
            rows = Rows(self.source.snapshot.schema, None, len(picked), ids)
            return rows, self._column_by_column(order, unit.lane, pieces[0], take)
        parts = [self._piece(order, unit.lane, piece) for piece in pieces]
        table = pa.concat_tables([rows for rows, _ in parts])
        if len(parts) > 1:
            table = table.combine_chunks()
        ids = _Identities([i for _, i in parts], [len(rows) for rows, _ in parts], picked)
        return self._transformed(table, take, ids, len(picked))

    def _in_whole_groups(self, order: Order, lane: int, piece: Piece) -> bool:
        """Whether a piece is whole row groups, of which every row is delivered as it is stored."""
        layout, chunk = order.layout, piece.chunk
        start, stop = int(layout.start[chunk]), int(layout.stop[chunk])
        if layout.fine or layout.live[chunk] != stop - start or self.source.transform is not None:
            return False
        with self._opened(order, chunk, lane) as opened:
            return opened.whole_groups(start + piece.low, start + piece.high)

    def _column_by_column(
        self, order: Order, lane: int, piece: Piece, take: Ints | None
    ) -> Columns:
        start = int(order.layout.start[piece.chunk])
        with self._opened(order, piece.chunk, lane) as opened:
            for name in self._wanted:
                table = opened.rows([name], start + piece.low, start + piece.high)
                yield from columns_of(table, take)

    def identities(self, order: Order, lane: int, piece: Piece) -> Ints:
        """Return the identities of a piece's rows."""
        table, ids = self._piece(order, lane, piece)
        return ids + np.arange(len(table)) if isinstance(ids, int) else ids

    def _transformed(
        self, table: pa.Table, take: Ints | None, ids: _Identities, count: int
    ) -> tuple[Rows, Columns]:
        at: Ints | None = None
        if self.source.transform is not None:
            before = len(table)
            table, kept = transformed(table, self.source.transform, drops=self._drops)
            if kept is not None:
                self._drops = True
                place = np.full(before, -1, np.int64)
                place[kept] = np.arange(len(kept))
                new = place if take is None else place[take]
                at = np.flatnonzero(new >= 0)
                take = new[at]
        return Rows(table.schema, at, count, ids), columns_of(table, take)

    def _piece(self, order: Order, lane: int, piece: Piece) -> tuple[pa.Table, Ints | int]:
        """Return live rows of a piece in stored order, and their identities (or the first one)."""
        layout, chunk = order.layout, piece.chunk
        file = int(layout.file[chunk])
        start, stop = int(layout.start[chunk]), int(layout.stop[chunk])
        if layout.fine:
            table, at = self._decoded(file)
            low, high = (start, stop) if at is None else np.searchsorted(at, (start, stop))
            table, at = table.slice(low, high - low), None if at is None else at[low:high]
        elif layout.live[chunk] == stop - start:
            with self._opened(order, chunk, lane) as opened:
                table = opened.rows(self._wanted, start + piece.low, start + piece.high)
            return table, int(row_ids(file, np.array(start + piece.low, np.int64)))
        else:
            with self._opened(order, chunk, lane) as opened:
                table, at = self._live(opened, start, stop)
        if len(table) != int(layout.live[chunk]):
            path = self._version.files[file].path
            raise StreamError(
                f"{self.source.snapshot}: {path!r} has {len(table)} live rows in "
                f"[{start}, {stop}), the plan counted {int(layout.live[chunk])}: was a file of "
                "the table replaced?"
            )
        table = table.slice(piece.low, piece.high - piece.low)
        if at is None:
            return table, int(row_ids(file, np.array(start + piece.low, np.int64)))
        return table, row_ids(file, at[piece.low : piece.high])

    def _decoded(self, file: int) -> tuple[pa.Table, Ints | None]:
        """Return a whole small file's live rows and positions; decoded once."""
        with self._lock_of(("file", file)):
            if file not in self._whole:
                opened = OpenFile(self._version, self._version.files[file], self._options)
                table, at = self._live(opened, 0, opened.stored)
                opened.close()
                self._whole[file] = (table.combine_chunks(), at)
            return self._whole[file]

    def _live(self, opened: OpenFile, start: int, stop: int) -> tuple[pa.Table, Ints | None]:
        kept = opened.kept(start, stop)
        if kept is None and not self._filters:
            return opened.rows(self._wanted, start, stop), None
        rows = opened.rows(self._needed, start, stop)
        rows = rows.append_column(ROW, pa.array(np.arange(start, stop, dtype=np.int64)))
        rows = rows if kept is None else rows.filter(pa.array(kept))
        if self._filters and self.source.snapshot.predicate is not None:
            rows = rows.filter(self.source.snapshot.predicate)
        return rows.select(self._wanted), rows[ROW].to_numpy()

    @contextmanager
    def _opened(self, order: Order, chunk: int, lane: int) -> Generator[OpenFile]:
        """Lend an open file to this thread.

        Reads of parts of one row group by one lane follow one another, so that each goes on where
        the last one ended.
        """
        layout, file = order.layout, int(order.layout.file[chunk])
        near = layout.block[max(chunk - 1, 0) : chunk + 2]
        parts = int((near == layout.block[chunk]).sum()) > 1
        who = ("lane", lane) if parts else ("thread", threading.get_ident())
        with self._lock_of(who):
            opened = self._lend((file, who))
            yield opened
            if not parts:  # nobody goes on from there
                opened.rest()
            self._give_back((file, who), opened)

    def _lock_of(self, who: Any) -> threading.Lock:
        with self._lock:
            return self._locks.setdefault(who, threading.Lock())

    def _lend(self, key: tuple[int, Any]) -> OpenFile:
        with self._lock:
            found = self._open.pop(key, None)
        return found or OpenFile(self._version, self._version.files[key[0]], self._options)

    def _give_back(self, key: tuple[int, Any], opened: OpenFile) -> None:
        with self._lock:
            self._open[key] = opened
            oldest = self._open.popitem(last=False)[1] if len(self._open) > self._most else None
        if oldest is not None:
            oldest.close()


def _trace(carrier: Carrier, began: int, unit: Unit, reads: int) -> None:
    if not reads:
        return
    attributes = {
        "lepton.reads": reads,
        "lepton.epoch": unit.epoch,
        "lepton.lane": unit.lane,
        "lepton.rows": unit.rows,
    }
    telemetry.record("lepton.read", carrier, began, attributes=attributes)


def transformed(
    rows: pa.Table, transform: Transform, *, drops: bool = False
) -> tuple[pa.Table, Ints | None]:
    """Apply a transform; return its rows and, where it dropped some, the indices of those kept.

    A transform that returns fewer rows is called again with the extra column :data:`ROW`, which it
    must carry through (``table.filter`` and ``table.take`` do); ``drops`` does so at once.

    Raises:
        StreamError: the transform returned something else.
    """
    if not drops:
        result: Any = transform(rows)
        if isinstance(result, pa.Table) and len(result) == len(rows):
            return result, None
        if not isinstance(result, pa.Table) or len(result) > len(rows):
            raise _wrong(result, len(rows))
    marked = rows.append_column(ROW, pa.array(np.arange(len(rows), dtype=np.int64)))
    result = transform(marked)
    if isinstance(result, pa.Table) and ROW not in result.column_names and len(result) == len(rows):
        return result, None
    if not isinstance(result, pa.Table) or ROW not in result.column_names:
        raise _wrong(result, len(rows))
    kept: Any = result[ROW].to_numpy()
    if len(kept) and (
        kept.dtype != np.int64 or kept[0] < 0 or kept[-1] >= len(rows) or (np.diff(kept) <= 0).any()
    ):
        raise _wrong(result, len(rows))
    return result.drop_columns(ROW), kept


def _wrong(result: Any, rows: int) -> StreamError:
    what = f"{len(result)} rows" if isinstance(result, pa.Table) else f"a {type(result).__name__}"
    return StreamError(
        f"transform returned {what} for an Arrow table of {rows} rows: it must return an Arrow "
        f"table with the same rows in the same order; one that drops rows must keep the column "
        f"{ROW!r} as it is, as table.filter(...) does"
    )


def expected_rows(source: Source, order: Order, unit: Unit) -> Ints:
    """Return the identities a unit should deliver, from the plan and the log (not the data).

    Only a table with deletion vectors or a row filter has to be read for this.
    """
    layout = order.layout
    ids: list[Ints] = []
    reader: Reader | None = None
    for chunk, low, high in order.window_pieces(unit.lane, unit.window):
        start, stop = int(layout.start[chunk]), int(layout.stop[chunk])
        file = int(layout.file[chunk])
        if layout.live[chunk] == stop - start:
            ids.append(row_ids(file, np.arange(start + low, start + high, dtype=np.int64)))
        else:
            reader = reader or Reader(source)
            ids.append(reader.identities(order, unit.lane, Piece(chunk, low, high)))
    return np.concatenate(ids)[order.window_rows(unit.lane, unit.window)[unit.low : unit.high]]


def read_here(
    source: Source, pieces: Iterable[tuple[Order, Unit]], slabs: Slabs, *, ahead: int
) -> Iterator[None]:
    """The ``worker`` engine: read units in this process, ``ahead`` of the consumer, in threads."""
    reader = Reader(source)
    waiting: deque[Future[None]] = deque()
    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="lepton-read")
    try:
        for order, unit in pieces:
            waiting.append(threads.submit(reader.lay, order, unit, slabs))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # an abandoned iterator may be collected on any thread, so do not wait for these
        threads.shutdown(wait=False, cancel_futures=True)
