"""Reading units: the rows a plan names, in the plan's order, each with its identity.

Both engines read with :class:`Reader`; they differ in where it runs.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from lepton import telemetry
from lepton.errors import LakeError, StreamError
from lepton.lake import Snapshot
from lepton.lake.predicate import columns_read
from lepton.lake.read import OpenFile
from lepton.stream.columns import Column, columns_of
from lepton.stream.memory import Pool
from lepton.stream.order import Ints, Order, Piece, Unit, row_ids
from lepton.telemetry import Carrier

ROW = "__row__"
"""Name of the int64 column by which a transform that drops rows says which it kept."""

Transform = Callable[[pa.Table], pa.Table]

THREADS = 2
OPEN_FILES = 16


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is needed to read any unit: picklable, sent once to every reader."""

    snapshot: Snapshot
    transform: Transform | None
    carrier: Carrier | None = None


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a unit as they were read.

    Attributes:
        columns: what is delivered: all planned rows, or those a transform kept.
        schema: of the columns, in Arrow's types.
        at: where in the unit each delivered row is, ascending; None: all are delivered.
        count: planned rows.
        identities: gives the identity of planned rows [low, high).
    """

    columns: Mapping[str, Column]
    schema: pa.Schema
    at: Ints | None
    count: int
    identities: Callable[[int, int], Ints]

    @property
    def size(self) -> int:
        """Bytes of the columns in memory."""
        return sum(column.values.nbytes for column in self.columns.values())

    def delivered(self, low: int, high: int) -> tuple[int, int]:
        """Return which delivered rows stand for planned rows [low, high)."""
        if self.at is None:
            return low, high
        begin, end = np.searchsorted(self.at, (low, high))
        return int(begin), int(end)


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
        self._lock = threading.Lock()
        self._locks: dict[Any, threading.Lock] = {}
        self._drops = False
        self._pool = Pool()

    def read(self, order: Order, unit: Unit) -> Rows:
        """Return the rows of a unit, transformed.

        Raises:
            StreamError: a file of the table cannot be read, or the transform is wrong.
        """
        began = time.time_ns()
        try:
            rows = self._by_column(order, unit) or self._by_table(order, unit)
        except LakeError as e:
            raise StreamError(
                f"the stream stops in epoch {unit.epoch}: {e}; nothing is lost: mend the table or "
                "the file and go on from the last state_dict() or checkpoint"
            ) from e
        if self.source.carrier is not None:
            _trace(self.source.carrier, began, unit)
        if telemetry.measuring():
            telemetry.measure("lepton.read.rows", rows.count)
            telemetry.measure("lepton.read.size", rows.size)
        return rows

    def _by_table(self, order: Order, unit: Unit) -> Rows:
        pieces = order.window_pieces(unit.lane, unit.window)
        parts = [self._piece(order, unit.lane, piece) for piece in pieces]
        table = pa.concat_tables([rows for rows, _ in parts])
        if len(parts) > 1:
            table = table.combine_chunks()
        picked = order.window_rows(unit.lane, unit.window)[unit.low : unit.high]
        whole = not order.shuffle and len(picked) == len(table)
        ids = _Identities([i for _, i in parts], [len(rows) for rows, _ in parts], picked)
        return self._transformed(table, None if whole else picked, ids, len(picked))

    def _by_column(self, order: Order, unit: Unit) -> Rows | None:
        """Read whole row groups column by column: each is put in order while in the cache."""
        pieces = order.window_pieces(unit.lane, unit.window)
        if len(pieces) != 1:
            return None
        piece, layout, chunk = pieces[0], order.layout, pieces[0].chunk
        start, rows = int(layout.start[chunk]) + piece.low, piece.high - piece.low
        stop, all_live = (
            start + rows,
            layout.live[chunk] == layout.stop[chunk] - layout.start[chunk],
        )
        if layout.fine or not all_live or self.source.transform is not None:
            return None
        take = order.window_rows(unit.lane, unit.window)[unit.low : unit.high]
        columns: dict[str, Column] = {}
        with self._opened(order, chunk, unit.lane) as opened:
            if not opened.whole_groups(start, stop):
                return None
            for name in self._wanted:
                table = opened.rows([name], start, stop)
                columns.update(columns_of(table, take, self._pool.empty))
        first = int(row_ids(int(layout.file[chunk]), np.array(start, np.int64)))
        ids = _Identities([first], [rows], take)
        return Rows(columns, self.source.snapshot.schema, None, len(take), ids)

    def identities(self, order: Order, lane: int, piece: Piece) -> Ints:
        """Return the identities of a piece's rows."""
        table, ids = self._piece(order, lane, piece)
        return ids + np.arange(len(table)) if isinstance(ids, int) else ids

    def _transformed(
        self, table: pa.Table, take: Ints | None, ids: _Identities, count: int
    ) -> Rows:
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
        columns = columns_of(table, take, self._pool.empty)
        return Rows(columns, table.schema, at, count, ids)

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
            oldest = self._open.popitem(last=False)[1] if len(self._open) > OPEN_FILES else None
        if oldest is not None:
            oldest.close()


def _trace(carrier: Carrier, began: int, unit: Unit) -> None:
    attributes = {
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
    source: Source, pieces: Iterable[tuple[Order, Unit]], *, ahead: int
) -> Iterator[tuple[Unit, Rows]]:
    """The ``worker`` engine: read units in this process, ``ahead`` of the consumer, in threads.

    At most ``ahead`` + 1 windows are in memory.
    """
    reader = Reader(source)

    waiting: deque[tuple[Unit, Future[Rows]]] = deque()
    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="lepton-read")
    try:
        for order, unit in pieces:
            waiting.append((unit, threads.submit(reader.read, order, unit)))
            if len(waiting) > ahead:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:  # an abandoned iterator may be collected on any thread, so do not wait for these
        threads.shutdown(wait=False, cancel_futures=True)
