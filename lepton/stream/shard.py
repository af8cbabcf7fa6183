"""One rank's part of a stream: its slice of every global batch, step by step.

Invariant: after the same step every rank's state is the same cursor, whatever the world size,
and all ranks make the same number of steps (a slice may be empty in a short last batch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from lepton.errors import StreamError
from lepton.stream.cursor import Cursor, cursor_of
from lepton.stream.order import Digest, Ints, Order, Unit, digest_of, lanes_of
from lepton.stream.reader import ROW
from lepton.stream.tensors import batch_of

if TYPE_CHECKING:
    from lepton.stream.stream import Stream

Format = Literal["torch", "arrow"]
Feed = Callable[[Cursor], Iterator[tuple[Unit, pa.Table]]]
"""From a cursor, the owned units in the order in which steps want them, with their rows."""


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's slice of a global batch.

    Attributes:
        epoch: from 0. step: global batch within the epoch, from 0.
        rows: the slice.
        ids: identity of each row (file index << 40 | stored position), as read.
        slots: position in the epoch of each row.
        global_rows: rows of the global batch that this step consumes, over all ranks.
    """

    epoch: int
    step: int
    rows: pa.Table
    ids: Ints
    slots: Ints
    global_rows: int

    @property
    def digest(self) -> Digest:
        """The order hash of what was delivered."""
        return digest_of(self.slots, self.ids)


class Shard:
    """An iterator over one rank's batches, through all remaining epochs."""

    def __init__(
        self,
        stream: Stream,
        rank: int,
        world_size: int,
        feed: Feed,
        *,
        cursor: Cursor | None = None,
        batch_format: Format = "torch",
    ) -> None:
        self._stream = stream
        self.rank = rank
        self.world_size = world_size
        self._feed = feed
        self._format = batch_format
        self._cursor = cursor or Cursor(order=stream.fingerprint)
        self._parts: Iterator[Part] | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        rows = self.next_part().rows
        return batch_of(rows) if self._format == "torch" else rows

    def __len__(self) -> int:
        """Steps that remain, over all epochs."""
        stream = self._stream
        per_epoch = stream.order(0).steps
        begun = -(-self._cursor.rows // stream.batch_size)
        done = self._cursor.epoch * per_epoch + begun
        rest = 1 if self._cursor.rows % stream.batch_size else 0
        return max(0, stream.epochs * per_epoch - done + rest)

    def iter_torch_batches(self, *, batch_size: int | None = None) -> Iterator[dict[str, Any]]:
        """Yield the rest of the current epoch as torch batches, as Ray Data's iterators do.

        Raises:
            ValueError: ``batch_size`` differs from the stream's, which is the global one.
        """
        if batch_size not in (None, self._stream.batch_size):
            raise ValueError(
                f"the stream's global batch size is {self._stream.batch_size}; leave batch_size "
                "out here and set it in table.stream(batch_size=...)"
            )
        epoch = self._cursor.epoch
        while self._cursor.epoch == epoch and epoch < self._stream.epochs:
            yield batch_of(self.next_part().rows)

    def next_part(self) -> Part:
        """Return the next slice with its bookkeeping.

        Raises:
            StopIteration: all epochs are done.
        """
        if self._parts is None:
            self._parts = self._assemble(self._cursor)
        part = next(self._parts)
        self._cursor = self._cursor.after(part.global_rows, self._stream.order(part.epoch).rows)
        return part

    def state_dict(self) -> dict[str, Any]:
        """Return the global cursor after the last batch handed out."""
        return self._cursor.to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state taken at any rank and any world size.

        Raises:
            StreamError: the state is of another order (table version, seed, batch size, …).
        """
        cursor = cursor_of(state)
        self._stream.check_cursor(cursor)
        self._cursor = cursor
        self._parts = None

    def _assemble(self, cursor: Cursor) -> Iterator[Part]:
        """Cut fed units into slices of global batches."""
        feed = self._feed(cursor)
        owned = lanes_of(self.rank, self.world_size, self._stream.lane_count)
        for epoch in range(cursor.epoch, self._stream.epochs):
            order = self._stream.order(epoch)
            consumed = cursor.rows if epoch == cursor.epoch else 0
            lanes = [_Lane(order, lane, order.lane_consumed(lane, consumed)) for lane in owned]
            for step in range(consumed // order.batch_size, order.steps):
                begin = max(consumed, step * order.batch_size)
                end = step * order.batch_size + order.batch_rows(step)
                self._fill(lanes, feed, end)
                taken = [lane.take(order.lane_consumed(lane.number, end)) for lane in lanes]
                yield _part(order, step, taken, self._stream.empty, end - begin)

    def _fill(self, lanes: list[_Lane], feed: Iterator[tuple[Unit, pa.Table]], end: int) -> None:
        """Read on until every lane has its rows of the first ``end`` of the epoch."""
        by_number = {lane.number: lane for lane in lanes}
        while any(lane.filled < lane.order.lane_consumed(lane.number, end) for lane in lanes):
            found = next(feed, None)
            if found is None:
                raise StreamError(
                    f"the rows of {self._stream.snapshot} ended before the plan did; "
                    f"resume from {self.state_dict()}"
                )
            by_number[found[0].lane].put(*found)


class _Lane:
    """Rows of one lane that were read and not yet delivered."""

    def __init__(self, order: Order, lane: int, consumed: int) -> None:
        self.order = order
        self.number = lane
        self._at = consumed
        self.filled = consumed
        self._tables: list[pa.Table] = []

    def put(self, unit: Unit, rows: pa.Table) -> None:
        """Add the next rows of the lane."""
        if not unit.offset <= self.filled < unit.offset + unit.rows:
            raise StreamError(
                f"lane {self.number} got rows from {unit.offset}, it wanted {self.filled}: "
                "this is a bug in lepton, please report it"
            )
        self._tables.append(rows)
        self.filled += len(rows)

    def take(self, until: int) -> tuple[list[pa.Table], Ints]:
        """Return the lane's rows up to lane row ``until``, and their slots."""
        count = until - self._at
        slots = self.order.slots(self.number, self._at, count)
        taken: list[pa.Table] = []
        while count > 0:
            head = self._tables.pop(0)
            taken.append(head.slice(0, count))
            if len(head) > count:
                self._tables.insert(0, head.slice(count))
            count -= len(taken[-1])
        self._at = until
        return taken, slots


def _part(
    order: Order, step: int, lanes: list[tuple[list[pa.Table], Ints]], empty: pa.Table, rows: int
) -> Part:
    tables = [t for taken, _ in lanes for t in taken]
    table = pa.concat_tables(tables) if tables else empty
    slots = np.concatenate([s for _, s in lanes])
    return Part(order.epoch, step, table.drop_columns(ROW), table[ROW].to_numpy(), slots, rows)
