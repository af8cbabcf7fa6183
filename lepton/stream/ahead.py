"""An iterator that runs in a thread, a few items ahead of its consumer."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")

POLL_S = 0.1


class Ahead(Generic[T]):
    """Iterates over a generator that another thread runs, at most ``depth`` items ahead.

    The thread ends, and closes the generator, when the items do, when the generator raises (the
    error reaches the consumer after the items before it), when :meth:`stop` is called, when
    nobody holds this object any more, and when the process exits.
    """

    def __init__(self, items: Generator[T], depth: int) -> None:
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._over = False
        stopped = threading.Event()
        self.stop = weakref.finalize(self, stopped.set)
        arguments = (items, self._queue, stopped)
        threading.Thread(target=_run, args=arguments, name="lepton-ahead", daemon=True).start()

    def __iter__(self) -> Ahead[T]:
        return self

    def __next__(self) -> T:
        if self._over:
            raise StopIteration
        item, error = self._queue.get()
        if error is None:
            return item  # pyright: ignore[reportReturnType] - without an error there is an item
        self._over = True
        if isinstance(error, StopIteration):
            raise StopIteration
        raise error


def _run(items: Generator[Any], into: queue.Queue[Any], stopped: threading.Event) -> None:
    end: tuple[None, BaseException] = (None, StopIteration())
    try:
        for item in items:
            if not _put((item, None), into, stopped):
                return
            del item  # it must not outlive its use here: its memory is used again
    except BaseException as e:  # noqa: BLE001 - it is raised again where the items are wanted
        end = (None, e)
    finally:
        items.close()
    _put(end, into, stopped)


def _put(what: Any, into: queue.Queue[Any], stopped: threading.Event) -> bool:
    while not stopped.is_set():
        try:
            into.put(what, timeout=POLL_S)
        except queue.Full:
            continue
        return True
    return False
