"""The row order of an epoch: a pure function of the layout, the seed, the epoch and the lanes.

A table is cut into *chunks* (row ranges inside files); chunks of one row group form a *block*. An
epoch permutes the blocks; the rows of all chunks, one after another, are the epoch's sequence. It
is cut into *lanes*, contiguous and as long as their share of the global batches: a global batch
takes its rows from every lane, lane 0 first. Within a lane, a few consecutive chunks form a
*window*, and the rows of a window are permuted. Any position is found in O(log chunks) and any
window is computable alone. Nothing here depends on how many workers read, or how.

Random numbers are raw Philox 4x64 output (Salmon et al., "Parallel Random Numbers: As Easy as
1, 2, 3", 2011), counter (0, place, epoch, purpose), key (seed, version), sorted into
permutations: stable across NumPy releases, which promise only the bit generators.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from heapq import merge
from typing import Any, NamedTuple

import numpy as np

ROW_BITS = 40

Ints = np.ndarray[Any, np.dtype[np.int64]]
Words = np.ndarray[Any, np.dtype[np.uint64]]

_BLOCKS, _ROWS = 0, 1  # purposes of the random numbers
NARROW_BITS = 18
_INDEX = np.arange(1 << NARROW_BITS, dtype=np.uint32)


@dataclass(frozen=True, eq=False)
class Layout:
    """The chunks of a table, in file order; arrays of equal length, one entry a chunk.

    Attributes:
        file: index of the data file.
        start: first stored position (rows).
        stop: stored position after the last.
        live: rows that are neither deleted nor filtered out.
        block: number of the block, ascending; its chunks stay together and in stored order.
        window_chunks: chunks in a window.
        fine: the table is small: files are decoded whole, chunks are slices of them.
    """

    file: Ints
    start: Ints
    stop: Ints
    live: Ints
    block: Ints
    window_chunks: int
    fine: bool = False

    @cached_property
    def rows(self) -> int:
        """Rows in an epoch."""
        return int(self.live.sum())


class Piece(NamedTuple):
    """Live rows [low, high) of a chunk."""

    chunk: int
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Unit:
    """What is read at once: rows [low, high) of a lane's permuted window.

    ``offset`` is the lane row where it begins, ``need`` the step that first wants it.
    """

    epoch: int
    lane: int
    window: int
    low: int
    high: int
    offset: int
    need: int

    @property
    def rows(self) -> int:
        """Rows in the unit."""
        return self.high - self.low


@dataclass(frozen=True, eq=False)
class Order:
    """One epoch's order over a layout."""

    layout: Layout
    epoch: int
    batch_size: int
    lanes: int
    seed: int = 0
    version: int = 0
    shuffle: bool = True

    @property
    def rows(self) -> int:
        """Rows in the epoch."""
        return self.layout.rows

    @cached_property
    def steps(self) -> int:
        """Global batches in the epoch; the last may be short."""
        return -(-self.layout.rows // self.batch_size)

    def batch_rows(self, step: int) -> int:
        """Rows of global batch ``step``."""
        return min(self.batch_size, self.layout.rows - step * self.batch_size)

    def share(self, rows: int, lane: int) -> int:
        """Rows that a lane gives to a global batch of ``rows``."""
        return rows // self.lanes + (lane < rows % self.lanes)

    def begin(self, rows: int, lane: int) -> int:
        """Where a lane's rows begin inside a global batch of ``rows``."""
        return lane * (rows // self.lanes) + min(lane, rows % self.lanes)

    def lane_consumed(self, lane: int, rows: int) -> int:
        """Lane rows consumed once the first ``rows`` rows of the epoch are."""
        step, rest = divmod(rows, self.batch_size)
        done = step * self.share(self.batch_size, lane)
        if rest == 0:
            return done
        batch = self.batch_rows(step)
        return done + min(max(rest - self.begin(batch, lane), 0), self.share(batch, lane))

    @cached_property
    def _chunks(self) -> Ints:
        """Chunks in the order of the sequence."""
        layout = self.layout
        if not self.shuffle or len(layout.block) == 0:
            return np.arange(len(layout.block), dtype=np.int64)
        first = np.flatnonzero(np.diff(layout.block, prepend=-1))
        count = np.diff(first, append=len(layout.block))
        blocks = self._permutation(len(first), 0, _BLOCKS)
        count, first = count[blocks], first[blocks]
        begin = np.cumsum(count) - count
        return np.repeat(first - begin, count) + np.arange(len(layout.block))

    @cached_property
    def _ends(self) -> Ints:
        """Rows of the sequence up to the end of each of its chunks."""
        return np.cumsum(self.layout.live[self._chunks])

    def _permutation(self, count: int, place: int, purpose: int) -> Ints:
        bits = np.random.Philox(
            key=[self.seed % 2**64, self.version % 2**64], counter=[0, place, self.epoch, purpose]
        )
        return permutation(bits.random_raw(words_for(count)), count)

    def lane_begin(self, lane: int) -> int:
        """Where a lane begins in the row sequence."""
        full, tail = divmod(self.layout.rows, self.batch_size)
        return full * self.begin(self.batch_size, lane) + self.begin(tail, lane)

    def _lane_chunks(self, lane: int) -> tuple[int, int, int, int]:
        """Return a lane's [first, last) in rows and [first, last) in chunks of the sequence."""
        first, last = self.lane_begin(lane), self.lane_begin(lane + 1)
        begin = int(np.searchsorted(self._ends, first, side="right"))
        end = int(np.searchsorted(self._ends, last, side="left")) + 1
        return first, last, begin, end

    def window_pieces(self, lane: int, window: int) -> list[Piece]:
        """Return what a lane's window is made of, in reading order."""
        first, last, begin, end = self._lane_chunks(lane)
        begin += window * self.layout.window_chunks
        pieces: list[Piece] = []
        for at in range(begin, min(begin + self.layout.window_chunks, end)):
            chunk, stop = int(self._chunks[at]), int(self._ends[at])
            start = stop - int(self.layout.live[chunk])
            low, high = max(first - start, 0), min(last, stop) - start
            pieces.append(Piece(chunk, low, high))
        return pieces

    def window_rows(self, lane: int, window: int) -> Ints:
        """Return the order of a window's rows: indices into its pieces' rows, laid end to end."""
        count = sum(p.high - p.low for p in self.window_pieces(lane, window))
        if not self.shuffle:
            return np.arange(count)
        return self._permutation(count, (lane << 32) | window, _ROWS)

    def lane_units(self, lane: int, consumed: int = 0) -> Iterator[Unit]:
        """Yield a lane's units in order, from its row ``consumed`` on."""
        first, last, begin, end = self._lane_chunks(lane)
        at, size = first + consumed, self.layout.window_chunks
        if at >= last:
            return
        per_step = self.share(self.batch_size, lane)
        window = (int(np.searchsorted(self._ends, at, side="right")) - begin) // size
        while at < last:
            here = begin + window * size
            start = max(int(self._ends[here - 1]), first) if here else first
            stop = min(int(self._ends[min(here + size, end) - 1]), last)
            offset = at - first
            need = min(offset // per_step, self.steps - 1)
            yield Unit(self.epoch, lane, window, at - start, stop - start, offset, need)
            at, window = stop, window + 1

    def units(self, lanes: range, rows: int = 0) -> Iterator[Unit]:
        """Yield the units of some lanes in the order in which steps want them.

        Args:
            lanes: which lanes.
            rows: rows of the epoch already consumed.
        """
        pieces = (self.lane_units(lane, self.lane_consumed(lane, rows)) for lane in lanes)
        return merge(*pieces, key=lambda u: (u.need, u.lane))

    def slots(self, lane: int, offset: int, count: int) -> Ints:
        """Return the positions in the epoch of lane rows [offset, offset + count)."""
        at = np.arange(offset, offset + count, dtype=np.int64)
        per_step = self.share(self.batch_size, lane)
        step = np.minimum(at // per_step, self.layout.rows // self.batch_size)
        tail = self.layout.rows % self.batch_size
        begin = np.where(
            step < self.layout.rows // self.batch_size,
            self.begin(self.batch_size, lane),
            self.begin(tail, lane),
        )
        return step * self.batch_size + begin + (at - step * per_step)


def permutation(words: Words, count: int) -> Ints:
    """Return a permutation of ``count`` items from random words.

    Each item's index is the low bits of a key whose high bits are random; sorting the keys
    permutes the items. No two keys are equal, so the result does not depend on how they are
    sorted. Up to 2**18 items have 32-bit keys, of which 14 bits or more are random: items whose
    random bits agree (16, on average, in the largest case) follow their index combined with one
    random mask, which takes each pair either way round. More items have 64-bit keys.

    Args:
        words: :func:`words_for` ``(count)`` of them.
        count: how many items.
    """
    result = np.empty(count, np.int64)
    bits = max(count - 1, 1).bit_length()
    if bits > NARROW_BITS:
        wide = words.view(np.uint32)[:count].astype(np.uint64) << np.uint64(32)
        wide |= np.arange(count, dtype=np.uint64)
        wide.sort()
        result[:] = wide & np.uint64((1 << bits) - 1)
        return result
    low = np.uint32((1 << bits) - 1)
    flip = np.uint32(words[-1] & np.uint64(low))
    keys = np.left_shift(words.view(np.uint16)[:count], np.uint32(16), dtype=np.uint32)
    if bits > 16:
        keys &= ~low
    keys |= _INDEX[:count] ^ flip
    keys.sort()
    keys &= low
    np.bitwise_xor(keys, flip, out=result, dtype=np.uint32, casting="unsafe")
    return result


def words_for(count: int) -> int:
    """Return how many random words a permutation of ``count`` items takes."""
    return (count // 2 if count > 1 << NARROW_BITS else count // 4) + 2


def lanes_of(rank: int, world_size: int, lanes: int) -> range:
    """Return the lanes that a rank owns: every ``world_size``-th from ``rank`` on."""
    return range(rank, lanes, world_size)


def row_ids(file: int, positions: Ints) -> Ints:
    """Return identities of rows: the file's index above 40 bits of stored position."""
    return (np.int64(file) << ROW_BITS) | positions


def place_of(row_id: int) -> tuple[int, int]:
    """Return (file's index, stored position) of a row's identity."""
    return row_id >> ROW_BITS, row_id & ((1 << ROW_BITS) - 1)


@dataclass(frozen=True, slots=True)
class Digest:
    """An order hash that adds up: over ranks, over steps, in any grouping.

    Each (position in the epoch, row identity) pair is mixed to two 64-bit words (the finalizer
    of SplitMix64, Steele et al. 2014) and the words are summed modulo 2**64. Equal digests mean
    the same rows at the same positions, each as often.
    """

    high: int = 0
    low: int = 0
    rows: int = 0

    def __add__(self, other: Digest) -> Digest:
        return Digest(
            (self.high + other.high) % 2**64, (self.low + other.low) % 2**64, self.rows + other.rows
        )

    def __str__(self) -> str:
        return f"{self.high:016x}{self.low:016x}"


def digest_of(slots: Ints, rows: Ints) -> Digest:
    """Return the digest of rows at positions."""
    pair = _mix(slots.astype(np.uint64)) ^ rows.astype(np.uint64)
    words = [_mix(pair + np.uint64(salt)) for salt in (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03)]
    return Digest(int(words[0].sum()), int(words[1].sum()), len(rows))


def _mix(x: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
