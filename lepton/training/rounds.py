"""Running the loop, and again from its top where the ranks of a sharded model change.

A worker whose ranks all hold everything mends a loss inside of its loop. A sharded one cannot: its
mesh, its process group and a part of its state are gone. So the loop's frame is left by an
exception, which lets go of all that belonged to the mesh, and the loop is called once more with
another worker in the same process.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

from lepton.training.group import Rewound
from lepton.training.worker import Worker

Loop = Callable[[Worker], None]


class Rounds:
    """Runs a loop to its end, with one worker after another if need be.

    Args:
        make: makes a worker; all of them sit on the same seat.

    Attributes:
        worker: the present one.
    """

    def __init__(self, make: Callable[[], Worker]) -> None:
        self._make = make
        self.worker = make()

    def run(self, loop: Loop) -> None:
        """Run it; what it raises is raised, except what a lost peer causes in a sharded run."""
        while not self._ends(loop):
            self.worker.leave()
            gc.collect()  # what is left of the mesh: closing its connections frees the peers
            self.worker = self._make()

    def _ends(self, loop: Loop) -> bool:
        try:
            loop(self.worker)
            self.worker.finish()
        except Rewound:
            return False
        except RuntimeError as e:
            if not self.worker.has_lost_peer(e):
                raise
            return False
        return True
