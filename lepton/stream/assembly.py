"""Putting batches together: from read units to one rank's slices of the global batches.

Invariant: slices come step by step, all ranks make the same number of steps, and a slice may be
empty in a short last batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lepton.errors import StreamError
from lepton.stream.columns import Values, interleaved, joined, to_arrow
from lepton.stream.cursor import Cursor
from lepton.stream.memory import Pool
from lepton.stream.order import Digest, Ints, Order, Unit, digest_of, lanes_of
from lepton.stream.reader import Rows
from lepton.stream.tensors import Batch, tensors_of

if TYPE_CHECKING:
    from lepton.stream.stream import Stream

Feed = Callable[[Cursor], Iterator[tuple[Unit, Rows]]]
"""From a cursor, the owned units in the order in which steps want them, with their rows."""

SLAB_BYTES = 4 * 2**20
"""Batches are put together several at a time, in about so much memory."""

Picked = tuple[Unit, Rows, int, int]
"""Planned rows [low, high) of a unit."""


class Part:
    """One rank's slice of a global batch.

    Attributes:
        epoch: from 0.
        step: global batch within the epoch, from 0.
        global_rows: planned rows of the global batch that this step consumes, over all ranks.
    """

    def __init__(self, order: Order, step: int, global_rows: int, slab: _Slab, at: int) -> None:
        self.epoch = order.epoch
        self.step = step
        self.global_rows = global_rows
        self._order = order
        self._slab = slab
        self._at = at

    @property
    def columns(self) -> dict[str, Values]:
        """Column name to ndarray of shape (rows, …) or Arrow array: what is delivered."""
        return {name: values[self._at] for name, values in self._slab.columns.items()}

    @cached_property
    def _picked(self) -> list[Picked]:
        many = self._slab.steps
        return [_nth(picked, self._at, many) for picked in self._slab.picked]

    @cached_property
    def ids(self) -> Ints:
        """Identity of each planned row (file index << 40 | stored position), as read.

        Rows that a transform dropped are among them: they are consumed.
        """
        return np.concatenate(
            [np.empty(0, np.int64), *(r.identities(a, b) for _, r, a, b in self._picked)]
        )

    @cached_property
    def slots(self) -> Ints:
        """Position in the epoch of each planned row."""
        order = self._order
        found = [order.slots(u.lane, u.offset + a, b - a) for u, _, a, b in self._picked]
        return np.concatenate([np.empty(0, np.int64), *found])

    @cached_property
    def digest(self) -> Digest:
        """The order hash of what was consumed."""
        return digest_of(self.slots, self.ids)

    @property
    def lanes(self) -> list[tuple[int, int]]:
        """This rank's lanes, in order, with the delivered rows of each in the slice."""
        found: dict[int, int] = {}
        for unit, rows, a, b in self._picked:
            low, high = rows.delivered(a, b)
            found[unit.lane] = found.get(unit.lane, 0) + high - low
        return list(found.items())

    @property
    def delivered(self) -> int:
        """Rows in the slice."""
        return len(next(iter(self.columns.values()), ()))

    @property
    def rows(self) -> pa.Table:
        """The slice as an Arrow table."""
        columns, schema = self.columns, self._slab.schema
        arrays = [to_arrow(columns[f.name], f.type) for f in schema]
        return pa.Table.from_arrays(arrays, schema=schema)

    @property
    def batch(self) -> Batch:
        """The slice as tensors; see :func:`lepton.stream.tensors.batch_of`."""
        return {name: values[self._at] for name, values in self._slab.tensors.items()}


class _Slab:
    """Several batches put together at once."""

    def __init__(
        self, columns: dict[str, Any], schema: pa.Schema, picked: list[Picked], steps: int
    ) -> None:
        self.columns = columns
        self.schema = schema
        self.picked = picked
        self.steps = steps

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """Column name to a sequence of tensors, or Arrow arrays, one a step."""
        return {name: tensors_of(name, values) for name, values in self.columns.items()}


class Assembly:
    """Cuts fed units into slices of global batches; runs ahead of the consumer, in a thread."""

    def __init__(self, stream: Stream, rank: int, world_size: int, pool: Pool) -> None:
        self._stream = stream
        self._owned = lanes_of(rank, world_size, stream.lane_count)
        self._pool = pool

    def slabs(self, feed: Feed, cursor: Cursor) -> Generator[list[Part]]:
        """Yield slices from a cursor on, several at a time where that saves work."""
        units = feed(cursor)
        for epoch in range(cursor.epoch, self._stream.epochs):
            order = self._stream.order(epoch)
            consumed = cursor.rows if epoch == cursor.epoch else 0
            lanes = [
                _Lane(order, lane, order.lane_consumed(lane, consumed)) for lane in self._owned
            ]
            step = consumed // order.batch_size
            while step < order.steps:
                begin = max(consumed, step * order.batch_size)
                end = step * order.batch_size + order.batch_rows(step)
                self._fill(lanes, units, end)
                full = end - begin == order.batch_size
                many = _steps_in_hand(order, lanes, step) if full else 0
                if many:
                    yield self._batches(order, lanes, step, many)
                else:
                    picked = [p for x in lanes for p in x.take(order.lane_consumed(x.number, end))]
                    yield [self._part(order, step, picked, end - begin)]
                step += many or 1

    def _fill(self, lanes: list[_Lane], units: Iterator[tuple[Unit, Rows]], end: int) -> None:
        """Read on until every lane has its rows of the first ``end`` of the epoch."""
        by_number = {lane.number: lane for lane in lanes}
        while any(lane.filled < lane.order.lane_consumed(lane.number, end) for lane in lanes):
            found = next(units, None)
            if found is None:
                raise StreamError(f"the rows of {self._stream.snapshot} ended before the plan did")
            by_number[found[0].lane].put(*found)

    def _batches(self, order: Order, lanes: list[_Lane], step: int, many: int) -> list[Part]:
        """Put full batches together, several at once."""
        size = order.batch_size
        picked = [x.take(x.at + many * order.share(size, x.number))[0] for x in lanes]
        first = picked[0][1]
        columns = {
            name: interleaved(
                [(r.columns[name], a, b) for _, r, a, b in picked], many, self._pool.empty
            )
            for name in first.columns
        }
        slab = _Slab(columns, first.schema, picked, many)
        return [Part(order, step + i, size, slab, i) for i in range(many)]

    def _part(self, order: Order, step: int, picked: list[Picked], rows: int) -> Part:
        """Put one batch together from whatever pieces it has."""
        spans = [(r, *r.delivered(a, b)) for _, r, a, b in picked]
        spans = [(r, a, b) for r, a, b in spans if b > a]
        if not spans:
            empty = self._stream.empty
            none = {n: [empty.column(n).combine_chunks()] for n in empty.column_names}
            return Part(order, step, rows, _Slab(none, empty.schema, picked, 1), 0)
        columns = {
            name: [joined([(r.columns[name], a, b) for r, a, b in spans])]
            for name in spans[0][0].columns
        }
        return Part(order, step, rows, _Slab(columns, spans[0][0].schema, picked, 1), 0)


class _Lane:
    """Rows of one lane that were read and not yet delivered."""

    def __init__(self, order: Order, lane: int, consumed: int) -> None:
        self.order = order
        self.number = lane
        self.at = consumed
        self.filled = consumed
        self._units: deque[tuple[Unit, Rows]] = deque()

    def put(self, unit: Unit, rows: Rows) -> None:
        """Add the next rows of the lane."""
        if unit.offset != self.filled:
            raise StreamError(
                f"lane {self.number} got rows from {unit.offset}, it wanted {self.filled}: "
                "this is a bug in lepton, please report it"
            )
        self._units.append((unit, rows))
        self.filled += rows.count

    @property
    def head(self) -> tuple[int, Rows] | None:
        """Rows left of the unit under way, and the unit."""
        if not self._units:
            return None
        unit, rows = self._units[0]
        return unit.offset + rows.count - self.at, rows

    def take(self, until: int) -> list[Picked]:
        """Return what the lane gives up to its row ``until``."""
        taken: list[Picked] = []
        while self.at < until:
            unit, rows = self._units[0]
            low = self.at - unit.offset
            high = min(until - unit.offset, rows.count)
            taken.append((unit, rows, low, high))
            self.at = unit.offset + high
            if high == rows.count:
                self._units.popleft()
        return taken


def _steps_in_hand(order: Order, lanes: list[_Lane], step: int) -> int:
    """Return how many full batches the units under way hold, as many as go into a slab."""
    size = order.batch_size
    many, width = order.rows // size - step, 0
    for lane in lanes:
        share, head = order.share(size, lane.number), lane.head
        if head is None or head[1].at is not None:
            return 0
        many = min(many, head[0] // share)
        width += share * sum(
            c.values.nbytes // max(1, len(c.values)) for c in head[1].columns.values()
        )
    return min(many, max(1, SLAB_BYTES // max(1, width)))


def _nth(picked: Picked, i: int, many: int) -> Picked:
    unit, rows, low, high = picked
    share = (high - low) // many
    return unit, rows, low + i * share, low + (i + 1) * share
