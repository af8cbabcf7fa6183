"""What is done once a second, in one thread a process, for whoever gathers figures meanwhile."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

PERIOD_S = 1.0

Call = Callable[[bool], None]
"""Called once a second; the argument says whether it is the last time."""

log = logging.getLogger("lepton")


class Rounds:
    """Calls that are made once a second; an error of one of them is said once and ends it."""

    def __init__(self) -> None:
        self._calls: list[Call] = []
        self._making = threading.Lock()
        self._thread: threading.Thread | None = None

    def join(self, call: Call) -> Callable[[], None]:
        """Make a call every second from now on; return what ends that."""
        self._calls = [*self._calls, call]
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="lepton-rounds", daemon=True)
            self._thread.start()

        def leave() -> None:
            self._calls = [c for c in self._calls if c is not call]

        return leave

    def make(self, *, last: bool = False) -> None:
        """Make every call now."""
        with self._making:
            for call in self._calls:
                try:
                    call(last)
                except Exception:
                    log.exception("telemetry: a figure cannot be taken; it is left out from now on")
                    self._calls = [c for c in self._calls if c is not call]

    def _run(self) -> None:
        stop = threading.Event()
        while not stop.wait(PERIOD_S):
            self.make()


rounds = Rounds()
"""This process's."""


def _renew() -> None:
    rounds.__init__()


os.register_at_fork(after_in_child=_renew)  # a child has none of the parent's threads
