"""One rank's part of a stream: its slice of every global batch, step by step.

Invariant: after the same step every rank's state is the same cursor, whatever the world size,
and all ranks make the same number of steps (a slice may be empty in a short last batch).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from lepton.errors import StreamError
from lepton.stream.columns import Values, interleaved, joined, to_arrow
from lepton.stream.cursor import Cursor, cursor_of
from lepton.stream.memory import Pool
from lepton.stream.order import Digest, Ints, Order, Unit, digest_of, lanes_of
from lepton.stream.reader import Rows
from lepton.stream.tensors import Batch, pinned, tensors_of

if TYPE_CHECKING:
    from lepton.stream.stream import Stream

Format = Literal["torch", "arrow"]
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

    @property
    def digest(self) -> Digest:
        """The order hash of what was consumed."""
        return digest_of(self.slots, self.ids)

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
        self.agree: Callable[[int], int] | None = None
        """How ranks that follow a table settle on rank 0's version; default torch.distributed."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        part = self.next_part()
        return part.batch if self._format == "torch" else part.rows

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
            yield self.next_part().batch

    def next_part(self) -> Part:
        """Return the next slice with its bookkeeping.

        Raises:
            StopIteration: all epochs are done.
            StreamError: a file cannot be read; the message holds the cursor to resume from.
        """
        if self._parts is None:
            self._parts = self._assemble(self._cursor)
        try:
            part = next(self._parts)
        except StreamError as e:
            raise StreamError(f"{e} [cursor: {self.state_dict()}]") from e
        self._cursor = self._cursor.after(part.global_rows, self._stream.order(part.epoch).rows)
        if self._stream.follow and part.epoch < self._cursor.epoch < self._stream.epochs:
            self.move_to((self.agree or self._agreed)(self._stream.newest()))
        return part

    def move_to(self, version: int) -> None:
        """Read the rest from another version of the table; only between epochs.

        Raises:
            StreamError: an epoch is under way.
            LakeError: no such version, or it lacks the stream's columns.
        """
        if self._cursor.rows:
            raise StreamError(f"{self._cursor} is in mid-epoch: a stream moves between epochs only")
        self._stream = self._stream.at(version)
        self._cursor = replace(self._cursor, order=self._stream.fingerprint, version=version)
        self._feed = self._stream.feed(self.rank, self.world_size)
        self._parts = None

    def _agreed(self, version: int) -> int:
        if self.world_size == 1:
            return version
        import torch.distributed as dist

        if not dist.is_initialized():
            raise StreamError(
                "ranks that follow a table must settle on one version: initialise "
                "torch.distributed, or set shard.agree to a function that returns rank 0's version"
            )
        chosen = [version]
        dist.broadcast_object_list(chosen, src=0)
        return chosen[0]

    def state_dict(self) -> dict[str, Any]:
        """Return the global cursor after the last batch handed out."""
        return self._cursor.to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state taken at any rank and any world size.

        Raises:
            StreamError: the state is of another order (table version, seed, batch size, …).
        """
        cursor = cursor_of(state)
        if cursor.version is not None and cursor.version != self._stream.snapshot.version:
            self._stream = self._stream.at(cursor.version)
            self._feed = self._stream.feed(self.rank, self.world_size)
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
            step = consumed // order.batch_size
            while step < order.steps:
                begin = max(consumed, step * order.batch_size)
                end = step * order.batch_size + order.batch_rows(step)
                self._fill(lanes, feed, end)
                many = _steps_in_hand(order, lanes, step) if end - begin == order.batch_size else 0
                if many:
                    yield from self._batches(order, lanes, step, many)
                else:
                    picked = [p for x in lanes for p in x.take(order.lane_consumed(x.number, end))]
                    yield self._part(order, step, picked, end - begin)
                step += many or 1

    def _fill(self, lanes: list[_Lane], feed: Iterator[tuple[Unit, Rows]], end: int) -> None:
        """Read on until every lane has its rows of the first ``end`` of the epoch."""
        by_number = {lane.number: lane for lane in lanes}
        while any(lane.filled < lane.order.lane_consumed(lane.number, end) for lane in lanes):
            found = next(feed, None)
            if found is None:
                raise StreamError(f"the rows of {self._stream.snapshot} ended before the plan did")
            by_number[found[0].lane].put(*found)

    @cached_property
    def _pool(self) -> Pool:
        """Memory for batches; made where they are read, not where the shard was."""
        return Pool(pinned() if self._format == "torch" else None)

    def _batches(self, order: Order, lanes: list[_Lane], step: int, many: int) -> Iterator[Part]:
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
        for i in range(many):
            yield Part(order, step + i, size, slab, i)

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
