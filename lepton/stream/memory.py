"""Memory that is used again: fresh pages cost more than the copies that fill them.

A buffer is free again when nothing outside refers to it: NumPy views and the tensors made from
them keep their buffer's reference count up, so a batch that a person holds on to is never
overwritten; its buffer is simply not free.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

_GRAIN = 1 << 16  # bytes; sizes are rounded up to it, so that windows of like size share buffers
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
        size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        buffer = self._buffer(-(-max(size, 1) // _GRAIN) * _GRAIN)
        return buffer[:size].view(kind).reshape(shape)

    def _buffer(self, size: int) -> Any:
        with self._lock:
            buffers = self._buffers
            for i in reversed(range(len(buffers))):
                if size <= len(buffers[i]) <= 2 * size and sys.getrefcount(buffers[i]) <= _FREE:
                    buffers.append(buffers.pop(i))  # the last one used is in the cache
                    return buffers[-1]
            if len(buffers) >= _MOST:
                free = [i for i in range(len(buffers)) if sys.getrefcount(buffers[i]) <= _FREE]
                for i in reversed(free or [0]):
                    del buffers[i]
            buffers.append(self._make(size))
            return buffers[-1]


def _ordinary(size: int) -> Any:
    return np.empty(size, np.uint8)


_MOST = 512  # buffers that a pool knows; beyond it, free ones are let go
