"""Cutting a table into chunks: where files, row groups and deletions leave their live rows.

A chunk is what one read decodes: consecutive row groups of a file up to a number of rows, or a
part of one row group that is more than twice as large. Parts of one row group form a block: they
are read one after another by one decoder. Small tables are decoded whole and cut finely instead,
so that they mix.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lepton.stream.order import Ints, Layout

LANE_CHUNKS = 32  # chunks that each lane of a small table gets at the least
MIN_CHUNK_ROWS = 16
MAX_CHUNK_ROWS = 131_072


@dataclass(frozen=True, slots=True)
class FileRows:
    """What the plan must know of a file.

    Attributes:
        index: number of the file in the table's version.
        stored: rows in the file.
        live: positions of the rows to deliver, ascending, or None when it is all of them.
        groups: rows of each row group, or None when the file is no larger than a chunk.
    """

    index: int
    stored: int
    live: Ints | None = None
    groups: Ints | None = None


def fine_rows(total: int, lanes: int) -> int:
    """Return the rows of a chunk of a small table of ``total`` rows."""
    return max(MIN_CHUNK_ROWS, -(-total // (lanes * LANE_CHUNKS)))


def swelling_of(stored: float, decoded: float) -> int:
    """Return how many times larger rows are decoded than they are stored: a power of two.

    Less than twice counts as 1. Sizes that are measured a little otherwise seldom give another.
    """
    times = int(decoded / max(1.0, stored))
    return 1 if times < 2 else 1 << (times - 1).bit_length()


def layout_of(
    files: Iterable[FileRows], chunk_rows: int, *, fine: bool, window_rows: int
) -> Layout:
    """Cut files into chunks of about ``chunk_rows`` rows.

    Args:
        files: by index.
        chunk_rows: largest chunk, in stored rows.
        fine: every chunk is a block of its own, and chunks need not keep to row groups.
        window_rows: rows of a window; it takes as many chunks as come near to that.
    """
    found = [_cut(file, chunk_rows, fine=fine) for file in files]
    counts = [f.shape[1] for f in found]
    index, start, stop, live, group = np.concatenate([np.empty((5, 0), np.int64), *found], axis=1)
    place = np.repeat(np.arange(len(found)), counts)
    changed = (np.diff(place, prepend=-1) != 0) | (np.diff(group, prepend=-1) != 0) | fine
    block = np.cumsum(changed) - 1
    mean = int(live.sum()) / max(1, len(live))
    size = max(1, round(window_rows / max(1.0, mean)))
    return Layout(index, start, stop, live, block, size, fine)


def _cut(file: FileRows, chunk_rows: int, *, fine: bool) -> Ints:
    """Return a file's chunks: file index, start, stop, live rows, first row of its block."""
    if 0 < file.stored <= chunk_rows and file.live is None:
        return np.array([[file.index], [0], [file.stored], [file.stored], [0]], np.int64)
    if fine or file.groups is None:
        starts = np.arange(0, file.stored, chunk_rows, dtype=np.int64)
        stops = np.minimum(starts + chunk_rows, file.stored)
        blocks = starts
    else:
        starts, stops, blocks = _by_group(file.groups, chunk_rows)
    live = stops - starts
    if file.live is not None:
        live = np.searchsorted(file.live, stops) - np.searchsorted(file.live, starts)
    keep = live > 0
    which = np.full(int(keep.sum()), file.index, dtype=np.int64)
    return np.stack([which, starts[keep], stops[keep], live[keep].astype(np.int64), blocks[keep]])


def _by_group(groups: Ints, chunk_rows: int) -> tuple[Ints, Ints, Ints]:
    """Join small row groups, split large ones evenly; return starts, stops, block starts."""
    starts: list[int] = []
    stops: list[int] = []
    blocks: list[int] = []
    at = 0
    for rows in (int(g) for g in groups if g):
        whole = bool(starts) and blocks[-1] == starts[-1] and at == stops[-1]
        if whole and at + rows - starts[-1] <= chunk_rows:
            stops[-1] = at + rows
        else:
            parts = 1 if rows < 2 * chunk_rows else -(-rows // chunk_rows)
            size = -(-rows // parts)
            for low in range(0, rows, size):
                starts.append(at + low)
                stops.append(at + min(low + size, rows))
                blocks.append(at)
        at += rows
    return np.array(starts, np.int64), np.array(stops, np.int64), np.array(blocks, np.int64)
