"""One rank's part of a stream: its slice of every global batch, step by step.

Invariant: after the same step every rank's state is the same cursor, whatever the world size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import pyarrow as pa

from lepton.errors import LakeError, StreamError
from lepton.stream.ahead import Ahead
from lepton.stream.assembly import Assembly, Feed, Part
from lepton.stream.cursor import Cursor, cursor_of
from lepton.stream.memory import Pool
from lepton.stream.tensors import pinned

if TYPE_CHECKING:
    from lepton.stream.mixture import MixedPart
    from lepton.stream.stream import Stream

Format = Literal["torch", "arrow"] | Callable[[pa.Table], Any]
"""Dicts of tensors, Arrow tables, or whatever a person's own collate function makes of a table."""

T = TypeVar("T")
Mark = tuple["Stream", Feed, Cursor]

SLABS_AHEAD = 2


def formed(part: Part | MixedPart, batch_format: Format) -> Any:
    """Return a slice as the consumer wants it."""
    if batch_format == "torch":
        return part.batch
    return part.rows if batch_format == "arrow" else batch_format(part.rows)


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
        self._format: Format = batch_format
        self._cursor: Cursor = cursor or Cursor(order=stream.fingerprint)
        self._parts: Ahead[list[Part]] | None = None
        self._ready: deque[Part] = deque()
        self._settled: int | None = None
        self.pin = False
        """Make batches in page-locked memory, where CUDA is there: they copy to the device while
        it computes. Hold each batch until its copy is done; lepton.train's worker does."""
        self.account = False
        """Work out each slice's digest ahead, in the thread that puts batches together."""
        self.agree: Callable[[int], int] | None = None
        """How ranks that follow a table settle on rank 0's version; default torch.distributed."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._next(lambda part: formed(part, self._format))

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
            yield self._next(lambda part: part.batch)

    def next_part(self) -> Part:
        """Return the next slice with its bookkeeping.

        After an error the next call begins again at the cursor.

        Raises:
            StopIteration: all epochs are done.
            StreamError: a file cannot be read; the message holds the cursor to resume from.
        """
        return self._next(lambda part: part)

    def _next(self, use: Callable[[Part], T]) -> T:
        try:
            return self.take(use)
        except (LakeError, StreamError) as e:
            raise StreamError(f"{e} [cursor: {self.state_dict()}]") from e

    def take(self, use: Callable[[Part], T], at_most: int | None = None) -> T:
        """Return what is made of the next slice; it counts as consumed once that is made.

        Args:
            use: makes it.
            at_most: global rows of which to take no more.

        Raises:
            StopIteration: all epochs are done.
            StreamError: a file cannot be read.
        """
        part, rest = self._front(), None
        if at_most is not None and at_most < part.global_rows:
            part, rest = part.split(at_most)
        made = use(part)
        self._ready.popleft()
        if rest is not None:
            self._ready.appendleft(rest)
        self._cursor = self._cursor.after(part.global_rows, part.epoch_rows)
        return made

    def take_rows(self, rows: int) -> list[Part]:
        """Return this rank's slices of the next ``rows`` global rows, across batches and epochs.

        Raises:
            StreamError: a file cannot be read; some of the rows may be consumed, see :meth:`mark`.
        """
        found: list[Part] = []
        while rows > 0:
            found.append(self.take(lambda part: part, at_most=rows))
            rows -= found[-1].global_rows
        return found

    def _front(self) -> Part:
        """Return the next slice, which is still to be taken."""
        try:
            self._follow()
            while not self._ready:
                self._ready.extend(next(self._parts or self._begin()))
        except StopIteration:
            raise
        except BaseException:  # the next call begins again at the cursor
            self._stop()
            raise
        return self._ready[0]

    def _follow(self) -> None:
        """Move to the newest version where an epoch begins, if the stream follows its table."""
        epoch = self._cursor.epoch
        if self._settled == epoch or not self._stream.follow:
            return
        if self._cursor.rows == 0 and 0 < epoch < self._stream.epochs:
            self.move_to((self.agree or self._agreed)(self._stream.newest()))
        self._settled = epoch

    def _begin(self) -> Ahead[list[Part]]:
        """Start putting batches together, in a thread, from the cursor on."""
        pool = Pool(pinned() if self.pin else None)
        assembly = Assembly(self._stream, self.rank, self.world_size, pool)
        parts = assembly.parts(self._feed, self._cursor)
        self._parts = Ahead(_accounted(parts) if self.account else parts, SLABS_AHEAD)
        return self._parts

    def close(self) -> None:
        """Stop reading ahead."""
        self._stop()

    def _stop(self) -> None:
        if self._parts is not None:
            self._parts.stop()
        self._parts = None
        self._ready.clear()

    def move_to(self, version: int) -> None:
        """Read the rest from another version of the table; only between epochs.

        Raises:
            StreamError: an epoch is under way.
            LakeError: no such version, or it lacks the stream's columns.
        """
        if self._cursor.rows:
            raise StreamError(f"{self._cursor} is in mid-epoch: a stream moves between epochs only")
        if version != self._cursor.version:
            stream = self._stream.at(version)
            cursor = replace(self._cursor, order=stream.fingerprint, version=version)
            feed = stream.feed(self.rank, self.world_size)
            self._stream, self._cursor, self._feed = stream, cursor, feed
            self._stop()
        self._settled = self._cursor.epoch

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

    def mark(self) -> Mark:
        """Return where this shard stands, to go back to."""
        return self._stream, self._feed, self._cursor

    def go_back(self, mark: Mark) -> None:
        """Read again from where this shard stood, unless it stands there still."""
        if mark != self.mark():
            self._stream, self._feed, self._cursor = mark
            self._settled = None
            self._stop()

    def state_dict(self) -> dict[str, Any]:
        """Return the global cursor after the last batch handed out."""
        return self._cursor.to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state taken at any rank and any world size.

        Raises:
            StreamError: the state is of another order (table version, seed, batch size, …).
        """
        stream, cursor = self._stream.started(cursor_of(state))
        if stream is not self._stream:
            self._stream, self._feed = stream, stream.feed(self.rank, self.world_size)
        self._cursor, self._settled = cursor, None
        self._stop()


def _accounted(slabs: Generator[list[Part]]) -> Generator[list[Part]]:
    """Work out what each slice consumed before it is handed on."""
    for parts in slabs:
        for part in parts:
            _ = part.digest
        yield parts
