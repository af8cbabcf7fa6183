"""The row order of an epoch: a pure function of the layout, the seed, the epoch and the lanes.

A table is cut into *chunks* (row ranges inside files). An epoch permutes the chunks, groups them
into *windows*, and permutes the rows inside each window; the rows of all windows one after
another are the epoch's row sequence. That sequence is cut into *lanes*, contiguous and as long as
their share of the global batches: a global batch takes its rows from every lane, lane 0 first.
Any position is found in O(log windows) and any window is computable alone. Nothing here depends
on how many workers read, or how.

Random numbers are raw Philox 4x64 output (Salmon et al., "Parallel Random Numbers: As Easy as
1, 2, 3", 2011), counter (0, window, epoch, purpose), key (seed, version), sorted into
permutations: stable across NumPy releases, which promise only the bit generators.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from heapq import merge
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]

WINDOW_CHUNKS = 4
MAX_CHUNK_ROWS = 65_536
_CHUNKS, _ROWS = 0, 1  # purposes of the random numbers


@dataclass(frozen=True, eq=False)
class Layout:
    """The chunks of a table, in file order; arrays of equal length, one entry a chunk.

    Attributes:
        file: index of the data file.
        start: first stored position (rows).
        stop: stored position after the last.
        live: rows that are neither deleted nor filtered out.
    """

    file: Ints
    start: Ints
    stop: Ints
    live: Ints

    @cached_property
    def rows(self) -> int:
        """Rows in an epoch."""
        return int(self.live.sum())


def layout_of(files: dict[int, int | Ints], stored: dict[int, int], lanes: int) -> Layout:
    """Cut files into chunks.

    Args:
        files: by file index, the number of live rows where all rows live, else their positions.
        stored: by file index, the number of stored rows.
        lanes: more lanes want smaller chunks, so that a small table still mixes.
    """
    total = sum(v if isinstance(v, int) else len(v) for v in files.values())
    size = min(MAX_CHUNK_ROWS, max(16, -(-total // (lanes * 32))))
    rows: list[tuple[Ints, Ints, Ints, Ints]] = []
    for index, live in sorted(files.items()):
        starts = np.arange(0, stored[index], size, dtype=np.int64)
        stops = np.minimum(starts + size, stored[index])
        if isinstance(live, int):
            counts = stops - starts
        else:
            counts = np.searchsorted(live, stops) - np.searchsorted(live, starts)
        keep = counts > 0
        which = np.full(int(keep.sum()), index, dtype=np.int64)
        rows.append((which, starts[keep], stops[keep], counts[keep].astype(np.int64)))
    columns = zip(*rows, strict=True) if rows else iter([()] * 4)
    return Layout(*(np.concatenate([np.empty(0, np.int64), *c]) for c in columns))


@dataclass(frozen=True, slots=True)
class Unit:
    """A contiguous piece of one lane: rows [low, high) of a permuted window.

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
        count = len(self.layout.live)
        return self._permutation(count, 0, _CHUNKS) if self.shuffle else np.arange(count)

    @cached_property
    def _ends(self) -> Ints:
        """Rows of the sequence up to the end of each window."""
        live = self.layout.live[self._chunks]
        return np.add.accumulate(np.add.reduceat(live, np.arange(0, len(live), WINDOW_CHUNKS)))

    def _permutation(self, count: int, window: int, purpose: int) -> Ints:
        bits = np.random.Philox(
            key=[self.seed % 2**64, self.version % 2**64], counter=[0, window, self.epoch, purpose]
        )
        return np.argsort(bits.random_raw(count), kind="stable")

    def window_chunks(self, window: int) -> Ints:
        """Return the chunks of a window, in reading order."""
        return self._chunks[window * WINDOW_CHUNKS : (window + 1) * WINDOW_CHUNKS]

    def window_rows(self, window: int) -> Ints:
        """Return the order of a window's rows: indices into its chunks' live rows."""
        count = int(self.layout.live[self.window_chunks(window)].sum())
        return self._permutation(count, window, _ROWS) if self.shuffle else np.arange(count)

    def lane_begin(self, lane: int) -> int:
        """Where a lane begins in the row sequence."""
        full, tail = divmod(self.layout.rows, self.batch_size)
        return full * self.begin(self.batch_size, lane) + self.begin(tail, lane)

    def lane_units(self, lane: int, consumed: int = 0) -> Iterator[Unit]:
        """Yield a lane's units in order, from its row ``consumed`` on."""
        first, last = self.lane_begin(lane), self.lane_begin(lane + 1)
        at = first + consumed
        per_step = self.share(self.batch_size, lane)
        window = int(np.searchsorted(self._ends, at, side="right"))
        while at < last:
            begin = int(self._ends[window - 1]) if window else 0
            stop = min(int(self._ends[window]), last)
            offset = at - first
            need = min(offset // per_step, self.steps - 1)
            yield Unit(self.epoch, lane, window, at - begin, stop - begin, offset, need)
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


def lanes_of(rank: int, world_size: int, lanes: int) -> range:
    """Return the lanes that a rank owns: every ``world_size``-th from ``rank`` on."""
    return range(rank, lanes, world_size)


def row_ids(file: int, positions: Ints) -> Ints:
    """Return identities of rows: the file's index above 40 bits of stored position."""
    return (np.int64(file) << 40) | positions


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
