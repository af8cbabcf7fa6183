"""Memory that is used again: fresh pages cost more than the copies that fill them.

A buffer is free again when nothing outside refers to it: NumPy views and the tensors made from
them keep their buffer's reference count up, so a batch that a person holds on to is never
overwritten; its buffer is simply not free.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

HUGE = 1 << 21
"""Bytes of a large page: batches lie far apart in memory, and large pages find them sooner."""

_LEAST = 1 << 16  # bytes; sizes are rounded up to powers of two, so that slabs share buffers:
# what is not written to takes no memory, unless it is pinned
_FREE = 2  # references to a buffer that only the pool knows: the list and getrefcount's argument


class Pool:
    """Buffers of one stream reader. Any thread may ask."""

    def __init__(self, make: Callable[[int], Any] | None = None) -> None:
        """Use ``make`` (bytes to a uint8 array) for new memory; default ordinary memory."""
        self._make = make or _ordinary
        self._buffers: list[Any] = []
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return an uninitialised array."""
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        buffer = self._buffer(max(_LEAST, 1 << (size - 1).bit_length()))
        return buffer[:size].view(kind).reshape(shape)

    def _buffer(self, size: int) -> Any:
        with self._lock:
            buffers = self._buffers
            for i in range(len(buffers) - 1, -1, -1):  # the last one used is in the cache
                if size <= len(buffers[i]) <= 2 * size and sys.getrefcount(buffers[i]) <= _FREE:
                    buffers.append(buffers.pop(i))
                    return buffers[-1]
            self._let_go()
            buffers.append(self._make(size))
            return buffers[-1]

    def _let_go(self) -> None:
        """Forget the free buffers, none of which fits, if they are a good part of the memory."""
        buffers = self._buffers
        free = [i for i in range(len(buffers)) if sys.getrefcount(buffers[i]) <= _FREE]
        if sum(len(buffers[i]) for i in free) > _UNUSED * sum(map(len, buffers)):
            for i in reversed(free):
                del buffers[i]


_UNUSED = 0.2
"""Share of the memory that may be free but of the wrong size."""


def _ordinary(size: int) -> Any:
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.empty(size, np.uint8)
    pages = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without them has ordinary pages there
        pages.madvise(mmap.MADV_HUGEPAGE)
    begin = -np.frombuffer(pages, np.uint8).ctypes.data % HUGE
    return np.frombuffer(pages, np.uint8, size, begin)  # views of a slice would not keep it
