"""Putting batches together: from read units to one rank's slices of the global batches.

Invariant: slices come step by step, all ranks make the same number of steps, and a slice may be
empty in a short last batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from lepton.errors import StreamError
from lepton.stream.columns import Values, to_arrow
from lepton.stream.cursor import Cursor
from lepton.stream.memory import Pool
from lepton.stream.order import Digest, Ints, digest_of, lanes_of
from lepton.stream.slabs import Filled, Picked, Slab, Slabs
from lepton.stream.tensors import Batch, batch_of

if TYPE_CHECKING:
    from lepton.stream.stream import Stream

Feed = Callable[[Cursor, Slabs], Iterator[object]]
"""From a cursor, lays the owned units, in the order in which steps want them; yields after each."""


class Part:
    """One rank's slice of a global batch.

    Attributes:
        epoch: from 0.
        step: global batch within the epoch, from 0.
        global_rows: planned rows of the global batch that this step consumes, over all ranks.
        epoch_rows: planned rows of the epoch.
    """

    def __init__(self, filled: Filled, at: int) -> None:
        slab = filled.slab
        self.epoch = slab.order.epoch
        self.step = slab.step + at
        self.global_rows = slab.global_rows(at)
        self.epoch_rows = slab.order.rows
        self._filled = filled
        self._at = at

    @property
    def places(self) -> range:
        """Positions in the epoch of the global rows."""
        slab = self._filled.slab
        end = min((self.step + 1) * slab.order.batch_size, self.epoch_rows)
        return range(end - self.global_rows, end)

    def split(self, rows: int) -> tuple[Part, Part]:
        """Return this rank's slices of the first ``rows`` of the global rows, and of the rest."""
        return Cut(self, self.places[:rows]), Cut(self, self.places[rows:])

    @property
    def columns(self) -> dict[str, Values]:
        """Column name to ndarray of shape (rows, …) or Arrow array: what is delivered."""
        return {name: values[self._at] for name, values in self._filled.columns.items()}

    @cached_property
    def picked(self) -> list[Picked]:
        """Where the planned rows come from, in order of their positions."""
        return self._filled.slab.picked(self._at)

    @cached_property
    def ids(self) -> Ints:
        """Identity of each planned row (file index << 40 | stored position), as read.

        Rows that a transform dropped are among them: they are consumed.
        """
        return np.concatenate(
            [np.empty(0, np.int64), *(r.identities(a, b) for _, r, a, b in self.picked)]
        )

    @cached_property
    def slots(self) -> Ints:
        """Position in the epoch of each planned row."""
        order = self._filled.slab.order
        found = [order.slots(u.lane, u.offset + a, b - a) for u, _, a, b in self.picked]
        return np.concatenate([np.empty(0, np.int64), *found])

    @cached_property
    def digest(self) -> Digest:
        """The order hash of what was consumed."""
        return digest_of(self.slots, self.ids)

    @property
    def lanes(self) -> list[tuple[int, int]]:
        """This rank's lanes, in order, with the delivered rows of each in the slice."""
        found: dict[int, int] = {}
        for unit, rows, a, b in self.picked:
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
        columns, schema = self.columns, self._filled.schema
        arrays = [to_arrow(columns[f.name], f.type) for f in schema]
        return pa.Table.from_arrays(arrays, schema=schema)

    @property
    def batch(self) -> Batch:
        """The slice as tensors; see :func:`batch_of`."""
        return batch_of(self.columns)


class Cut(Part):
    """What a slice has of a range of the epoch's positions: rows next to each other."""

    def __init__(self, whole: Part, places: range) -> None:
        super().__init__(whole._filled, whole._at)
        self.global_rows = len(places)
        self._whole = whole
        self._places = places

    @property
    def places(self) -> range:
        """Positions in the epoch of the global rows."""
        return self._places

    @property
    def columns(self) -> dict[str, Values]:
        """Column name to ndarray of shape (rows, …) or Arrow array: what is delivered."""
        low = self._rows_before(self._planned.start)
        high = self._rows_before(self._planned.stop)
        return {name: values[low:high] for name, values in self._whole.columns.items()}

    @cached_property
    def picked(self) -> list[Picked]:
        """Where the planned rows come from, in order of their positions."""
        found, at = list[Picked](), 0
        for unit, rows, a, b in self._whole.picked:
            low, high = (
                min(max(i - at, 0), b - a) for i in (self._planned.start, self._planned.stop)
            )
            if low < high:
                found.append(Picked(unit, rows, a + low, a + high))
            at += b - a
        return found

    @cached_property
    def ids(self) -> Ints:
        """Identity of each planned row (file index << 40 | stored position), as read."""
        return self._whole.ids[self._planned.start : self._planned.stop]

    @cached_property
    def slots(self) -> Ints:
        """Position in the epoch of each planned row."""
        return self._whole.slots[self._planned.start : self._planned.stop]

    @cached_property
    def _planned(self) -> range:
        """Which of the slice's planned rows."""
        ends = (self._places.start, self._places.stop)
        low, high = np.searchsorted(self._whole.slots, ends).tolist()
        return range(low, high)

    def _rows_before(self, planned: int) -> int:
        """Return how many of the slice's first planned rows are delivered."""
        count = 0
        for _, rows, a, b in self._whole.picked:
            low, high = rows.delivered(a, a + min(planned, b - a))
            count, planned = count + high - low, max(planned - (b - a), 0)
        return count


class Assembly:
    """Has a rank's slabs filled, and cuts them; runs ahead of the consumer, in a thread."""

    def __init__(self, stream: Stream, rank: int, world_size: int, pool: Pool) -> None:
        self._stream = stream
        self._owned = lanes_of(rank, world_size, stream.lane_count)
        self._pool = pool

    def parts(self, feed: Feed, cursor: Cursor) -> Generator[list[Part]]:
        """Yield slices from a cursor on, a slab's at a time."""
        slabs = Slabs(self._owned, cursor, self._pool.empty, lambda: self._stream.nothing)
        units = feed(cursor, slabs)
        for epoch in range(cursor.epoch, self._stream.epochs):
            order = self._stream.order(epoch)
            step = (cursor.rows if epoch == cursor.epoch else 0) // order.batch_size
            while step < order.steps:
                slab = slabs.slab(order, step)
                self._fill(slab, units)
                step += slab.steps
                filled = slabs.take(slab)
                yield [Part(filled, i) for i in range(slab.steps)]
                del slab, filled  # their memory is used again when the consumer is done with it

    def _fill(self, slab: Slab, units: Iterator[object]) -> None:
        while not slab.complete:
            if next(units, units) is units:
                raise StreamError(f"the rows of {self._stream.snapshot} ended before the plan did")
