"""Slabs: consecutive slices of one rank's batches, put together by whoever reads their rows.

A window's rows go to many steps, and a step's rows come from the windows of all the rank's lanes.
So that values are written once, and while they are in the cache, the thread that has decoded a
column puts its rows in order straight into the batches. A slab is handed on when the last of its
rows is in; which steps share a slab is a pure function of the plan and of where reading began.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from lepton.errors import StreamError
from lepton.stream.columns import (
    Allocate,
    Column,
    Values,
    gather,
    is_list,
    joined,
    sealed,
    without_rows,
)
from lepton.stream.cursor import Cursor
from lepton.stream.order import Ints, Layout, Order, Unit

PER_WINDOW = 2
"""Slabs over which a window is spread: fewer are cheaper to fill (each piece of a column gives the
interpreter's lock away and takes it again), more need less memory."""
EARLY = 8
"""Where reading begins, a slab has this part of the usual steps: they can be taken the sooner."""
WIDE_BYTES = 512
"""Rows of a column from so many bytes on are copied one by one at full speed."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a unit as they were read.

    Attributes:
        columns: what is delivered: all planned rows, or those a transform kept. Empty once laid.
        schema: of the columns, in Arrow's types.
        at: where in the unit each delivered row is, ascending; None: all are delivered.
        count: planned rows.
        identities: gives the identity of planned rows [low, high).
    """

    schema: pa.Schema
    at: Ints | None
    count: int
    identities: Callable[[int, int], Ints]
    columns: Mapping[str, Column] = field(default_factory=dict[str, Column])

    def delivered(self, low: int, high: int) -> tuple[int, int]:
        """Return which delivered rows stand for planned rows [low, high)."""
        if self.at is None:
            return low, high
        begin, end = np.searchsorted(self.at, (low, high))
        return int(begin), int(end)


class Picked(NamedTuple):
    """Planned rows [low, high) of a unit."""

    unit: Unit
    rows: Rows
    low: int
    high: int


class _Seat(NamedTuple):
    """A lane's rows in a slab: lane rows [low, high), ``per`` a step, from place ``at`` on."""

    low: int
    high: int
    per: int
    at: int


class Slab:
    """Some consecutive slices. Any thread may fill it.

    Attributes:
        order: of the epoch.
        step: the first.
        steps: how many.
        begin: rows of the epoch consumed before the first step.
        width: rows of a slice.
    """

    def __init__(
        self, order: Order, lanes: Sequence[int], step: int, steps: int, begin: int, empty: Allocate
    ) -> None:
        self.order = order
        self.step = step
        self.steps = steps
        self.begin = begin
        end = min((step + steps) * order.batch_size, order.rows)
        self._seats: dict[int, _Seat] = {}
        self.width = 0
        for lane in lanes:
            low, high = order.lane_consumed(lane, begin), order.lane_consumed(lane, end)
            self._seats[lane] = _Seat(low, high, (high - low) // steps, self.width)
            self.width += (high - low) // steps
        self._empty = empty
        self._lock = threading.Lock()
        self._left = self.width * steps
        self._arrays: dict[str, tuple[Any, Any]] = {}
        self._pieces: dict[str, dict[Unit, tuple[Rows, Column]]] = {}
        self._units: dict[int, list[tuple[Unit, Rows]]] = {lane: [] for lane in lanes}

    @property
    def complete(self) -> bool:
        """Whether all rows are in."""
        return self._left == 0

    def global_rows(self, i: int) -> int:
        """Planned rows of the slab's i-th global batch that are still to be consumed."""
        done = self.begin if i == 0 else (self.step + i) * self.order.batch_size
        return min((self.step + i + 1) * self.order.batch_size, self.order.rows) - done

    def put(self, unit: Unit, rows: Rows, name: str, column: Column, ordered: Column) -> None:
        """Put in what a unit has of a column.

        Args:
            unit: whose rows.
            rows: all of them.
            name: of the column.
            column: as it was read: kept if its values do not go into an array.
            ordered: the same values, perhaps in order already, in memory that is used again.
        """
        array = None if rows.at is not None else self._array(name, column)
        if array is None:
            with self._lock:
                self._pieces.setdefault(name, {})[unit] = (rows, column)
            return
        seat = self._seats[unit.lane]
        low, high = max(unit.offset, seat.low), min(unit.offset + unit.rows, seat.high)
        _write(array, seat, (low - seat.low, high - seat.low), ordered, low - unit.offset)

    def _array(self, name: str, column: Column) -> Any:
        """Return where a column's values go, or None if they do not go into an array."""
        form = column.form
        if form is None:
            return None
        with self._lock:
            if name not in self._arrays:
                shape = (self.steps, self.width, *form[1])
                self._arrays[name] = (self._empty(shape, form[0]), column.type)
            array, _ = self._arrays[name]
        return array if (array.dtype, array.shape[2:]) == form else None

    def done(self, unit: Unit, rows: Rows) -> None:
        """Say that all of a unit's columns are in."""
        seat = self._seats[unit.lane]
        with self._lock:
            self._units[unit.lane].append((unit, rows))
            self._left -= min(unit.offset + unit.rows, seat.high) - max(unit.offset, seat.low)

    def picked(self, i: int) -> list[Picked]:
        """Return where the planned rows of the i-th slice come from, in delivery order."""
        found: list[Picked] = []
        for lane, seat in self._seats.items():
            at, end = seat.low + i * seat.per, seat.low + (i + 1) * seat.per
            for unit, rows in sorted(self._units[lane], key=lambda u: u[0].offset):
                high = min(end, unit.offset + unit.rows)
                if unit.offset <= at < high:
                    found.append(Picked(unit, rows, at - unit.offset, high - unit.offset))
                    at = high
            if at != end:
                raise StreamError(
                    f"rows {at} to {end} of lane {lane} did not come: this is a bug in lepton, "
                    "please report it"
                )
        return found

    def columns(self, none: Callable[[], Nothing]) -> dict[str, Any]:
        """Return each column as an array of shape (steps, rows, …), or a list, one item a step.

        Args:
            none: returns what slices without rows have.
        """
        if not self.width:
            return {name: [values] * self.steps for name, values in none().columns.items()}
        return {name: self._column(name, none) for name in self.schema.names}

    @property
    def schema(self) -> pa.Schema:
        """Of the columns, in Arrow's types; of a slab that has rows."""
        return next(units[0][1] for units in self._units.values() if units).schema

    def _column(self, name: str, none: Callable[[], Nothing]) -> Any:
        if name not in self._pieces:
            array, kind = self._arrays[name]
            return sealed(array, kind)
        return [self._joined(name, i, none) for i in range(self.steps)]

    def _joined(self, name: str, i: int, none: Callable[[], Nothing]) -> Values:
        """Put one slice of a column together, some of which is Arrow or was dropped."""
        spans: list[tuple[Column, int, int]] = []
        pieces, at = self._pieces[name], 0
        for unit, rows, low, high in self.picked(i):
            if unit in pieces:
                begin, end = rows.delivered(low, high)
                spans.append((pieces[unit][1], begin, end))
            else:
                array, kind = self._arrays[name]
                spans.append((Column(array[i], kind), at, at + high - low))
            at += high - low
        spans = [span for span in spans if span[2] > span[1]]
        if spans:
            return joined(spans)
        for _, column in pieces.values():
            if column.form is not None or not is_list(column.type):
                return joined([(column, 0, 0)])
        return none().columns[name]  # how long its lists are was not seen in this slab


class Nothing(NamedTuple):
    """What a slice without rows has: columns of the shape that rows have, and their types."""

    columns: dict[str, Values]
    schema: pa.Schema


def nothing_of(columns: Mapping[str, Values], schema: pa.Schema) -> Nothing:
    """Return what is left of columns without their rows, in memory of its own."""
    return Nothing(
        {name: without_rows(v, schema.field(name).type) for name, v in columns.items()}, schema
    )


class Slabs:
    """The slabs of one rank that are being filled: those of which a unit has been read.

    Args:
        lanes: the rank's.
        start: where reading begins.
        empty: makes arrays, as ``numpy.empty`` does.
        none: returns what a slice without rows has, for ranks that have not had any.
    """

    def __init__(
        self,
        lanes: Sequence[int],
        start: Cursor,
        empty: Allocate,
        none: Callable[[], Nothing],
    ) -> None:
        self._known: Nothing | None = None
        self._lanes = lanes
        self._start = start
        self._empty = empty
        self._none = none
        self._open: dict[tuple[int, int], Slab] = {}
        self._lock = threading.Lock()

    def lay(
        self, order: Order, unit: Unit, rows: Rows, columns: Iterable[tuple[str, Column]]
    ) -> None:
        """Put a unit's rows where they belong."""
        slabs = list(self._touched(order, unit))
        for name, column in columns:
            at_once = rows.at is None and len(self._lanes) > 1
            ordered = _in_order(column) if at_once else column
            for slab in slabs:
                slab.put(unit, rows, name, column, ordered)
        for slab in slabs:
            slab.done(unit, rows)

    def slab(self, order: Order, step: int) -> Slab:
        """Return the slab that a step is in."""
        begun = self._start.rows if order.epoch == self._start.epoch else 0
        first, steps = steps_of(order, step, begun)
        with self._lock:
            key = (order.epoch, first)
            if key not in self._open:
                begin = max(first * order.batch_size, begun)
                self._open[key] = Slab(order, self._lanes, first, steps, begin, self._empty)
            return self._open[key]

    def take(self, slab: Slab) -> Filled:
        """Hand a complete slab on."""
        with self._lock:
            del self._open[slab.order.epoch, slab.step]
        filled = Filled(slab, self._nothing)
        if self._known is None and (seen := filled.with_rows()) is not None:
            self._known = nothing_of(seen, filled.schema)
        return filled

    def _nothing(self) -> Nothing:
        return self._none() if self._known is None else self._known

    def _touched(self, order: Order, unit: Unit) -> Iterator[Slab]:
        share = order.share(order.batch_size, unit.lane)
        full = order.rows // order.batch_size
        step, last = (min(row // share, full) for row in (unit.offset, unit.offset + unit.rows - 1))
        while step <= last:
            slab = self.slab(order, step)
            yield slab
            step = slab.step + slab.steps


class Filled:
    """A slab with all its rows: what a consumer cuts its batches from."""

    def __init__(self, slab: Slab, none: Callable[[], Nothing]) -> None:
        self.slab = slab
        self.columns = slab.columns(none)
        self._none = none

    def with_rows(self) -> dict[str, Values] | None:
        """Return the columns of the first slice that has rows."""
        for i in range(self.slab.steps):
            found = {name: values[i] for name, values in self.columns.items()}
            if len(next(iter(found.values()), ())):
                return found
        return None

    @cached_property
    def schema(self) -> pa.Schema:
        """Of the columns, in Arrow's types."""
        return self.slab.schema if self.slab.width else self._none().schema


def steps_of(order: Order, step: int, begun: int) -> tuple[int, int]:
    """Return the first step of the slab that a step is in, and how many it has.

    Args:
        order: of the epoch.
        step: of the epoch.
        begun: rows of the epoch consumed before reading began. A batch that was begun, and a
            short last one, have a slab of their own.
    """
    begin, full = -(-begun // order.batch_size), order.rows // order.batch_size
    if not begin <= step < full:
        return step, 1
    size = max(1, window_rows(order.layout) * order.lanes // (order.batch_size * PER_WINDOW))
    early = min(begin + max(1, size // EARLY), full)
    if step < early:
        return begin, early - begin
    first = max(step // size * size, early)
    return first, min((step // size + 1) * size, full) - first


def window_rows(layout: Layout) -> int:
    """Return about how many rows a window has."""
    return layout.rows * layout.window_chunks // max(1, len(layout.live))


def _write(array: Any, seat: _Seat, span: tuple[int, int], column: Column, at: int) -> None:
    """Write a column's rows from ``at`` on to a lane's rows [low, high) of a slab.

    Args:
        array: of shape (steps, rows, …).
        seat: where the lane's rows are.
        span: which of these, counted from the slab's first step.
        column: the values.
        at: the first row of them.
    """
    row, end = span
    per, left, right = seat.per, seat.at, seat.at + seat.per
    ordered = column.take is None
    while row < end:
        step, begin = divmod(row, per)
        whole = 0 if begin else (end - row) // per
        if not whole:  # a part of one step
            count = min(per - begin, end - row)
            gather(column, at, array[step, left + begin : left + begin + count])
        elif per == array.shape[1]:
            count = whole * per
            gather(column, at, array[step : step + whole].reshape(count, *array.shape[2:]))
        elif ordered:
            count = whole * per
            rows = column.values[at : at + count]
            array[step : step + whole, left:right] = rows.reshape(whole, per, *array.shape[2:])
        else:
            count = per
            gather(column, at, array[step, left:right])
        row, at = row + count, at + count


def _in_order(column: Column) -> Column:
    """Return a column of narrow rows as they are delivered, in this thread's own memory.

    Rows are put in order by one call, and are in the cache when they are copied on; wide ones are
    copied one by one at full speed.
    """
    if column.form is None or column.take is None or column.values.strides[0] >= WIDE_BYTES:
        return column
    block = _scratch((len(column.take), *column.values.shape[1:]), column.values.dtype)
    gather(column, 0, block)
    return Column(block, column.type)


def _scratch(shape: tuple[int, ...], kind: Any) -> Any:
    """Return this thread's array for what is at once copied on: the same memory each time."""
    size = math.prod(shape) * np.dtype(kind).itemsize
    held: Any = getattr(_HELD, "memory", None)
    if held is None or len(held) < size:
        held = _HELD.memory = np.empty(size, np.uint8)
    return held[:size].view(kind).reshape(shape)


_HELD = threading.local()
