"""How quick a model is, and what follows: where to run it, how much at once, when to refuse.

Pure: measured seconds in, decisions out. A net that answers within :data:`INLINE_S` runs where
the request is read, since handing it to a thread would cost more than it does; a slower one runs
in a thread, over all requests that wait, as many rows as fit into :data:`BATCH_S`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

INLINE_S = 0.001
WAITED = 20  # times as long by the clock: then it does wait for something, such as a device
BATCH_S = 0.05
LONGEST_WAIT_S = 2.0
BELIEVED = 16  # times as many rows as any run had: what more would take is not known
MEMORY = 50
MOST_ROWS = 4096


@dataclass
class Line:
    """A line through runs, seconds over rows; newer runs weigh more.

    The first run, which warms up, counts only until there is another.

    Attributes:
        runs: how many were seen.
    """

    runs: int = 0
    _rows: float = 0.0
    _seconds: float = 0.0
    _square: float = 0.0
    _product: float = 0.0

    def took(self, rows: int, seconds: float) -> None:
        """Take in that a run over ``rows`` rows took so long."""
        self.runs += 1
        weight = max(1 / MEMORY, 1 / max(1, self.runs - 1))
        self._rows += weight * (rows - self._rows)
        self._seconds += weight * (seconds - self._seconds)
        self._square += weight * (rows * rows - self._square)
        self._product += weight * (rows * seconds - self._product)

    @property
    def row_s(self) -> float:
        """Seconds that one more row costs; runs of one size alone tell no more than the mean."""
        if not self.runs:
            return 0.0
        mean = self._seconds / self._rows
        spread = self._square - self._rows**2
        if spread <= 1e-6 * self._square:
            return mean
        slope = (self._product - self._rows * self._seconds) / spread
        return min(max(slope, 0.0), mean)

    def run_s(self, rows: int) -> float:
        """Seconds that a run over so many rows will take."""
        return self._seconds + (rows - self._rows) * self.row_s


@dataclass
class Pace:
    """What one model's runs took, by the clock and of the processor.

    By the clock a short run in a thread takes as long as the others let it wait: that says how
    long requests will wait, but not whether it is worth a thread.

    Attributes:
        largest: rows of the largest run so far.
    """

    clock: Line = field(default_factory=Line)
    own: Line = field(default_factory=Line)
    largest: int = 0

    def took(self, rows: int, seconds: float, own_s: float | None = None) -> None:
        """Take in that a run over ``rows`` rows took so long; of the processor ``own_s``."""
        self.largest = max(self.largest, rows)
        self.clock.took(rows, seconds)
        self.own.took(rows, seconds if own_s is None else own_s)

    @property
    def is_known(self) -> bool:
        """Whether so many runs were seen that one more says next to nothing."""
        return self.own.runs >= MEMORY

    def inline_for(self, rows: int) -> bool:
        """Whether such a run is too short to be worth a thread. The first run gets a thread."""
        known = self.own.runs > 0 and rows <= BELIEVED * self.largest
        quick = known and self.own.run_s(rows) <= INLINE_S
        return quick and self.clock.run_s(rows) <= WAITED * INLINE_S

    @property
    def most_rows(self) -> int:
        """How many rows to run at once, at least one; a request is never cut."""
        line = self.clock
        if not line.runs:
            return 1
        spare = BATCH_S - line.run_s(0)
        return min(MOST_ROWS, max(1, int(spare / line.row_s))) if line.row_s > 0 else MOST_ROWS

    def retry_after_s(self, rows: int) -> int | None:
        """Whole seconds after which to come again if ``rows`` wait already; None: it may wait."""
        wait = rows * self.clock.row_s
        return round(wait) if wait > LONGEST_WAIT_S else None
