"""How quick a model is, and what follows: where to run it, how much at once, when to refuse.

Pure: measured seconds in, decisions out. A net that answers within :data:`INLINE_S` runs where
the request is read, since handing it to a thread would cost more than it does; a slower one runs
in a thread, over all requests that wait, as many rows as fit into :data:`BATCH_S`.
"""

from __future__ import annotations

from dataclasses import dataclass

INLINE_S = 0.001
BATCH_S = 0.05
LONGEST_WAIT_S = 2.0
MEMORY = 50
MOST_ROWS = 4096


@dataclass
class Pace:
    """A line through one model's runs, seconds over rows; newer runs weigh more.

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
        weight = max(1 / MEMORY, 1 / self.runs)
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

    def inline_for(self, rows: int) -> bool:
        """Whether such a run is too short to be worth a thread. The first run gets a thread."""
        return self.runs > 0 and self.run_s(rows) <= INLINE_S

    @property
    def most_rows(self) -> int:
        """How many rows to run at once, at least one; a request is never cut."""
        if not self.runs:
            return 1
        spare = BATCH_S - self.run_s(0)
        return min(MOST_ROWS, max(1, int(spare / self.row_s))) if self.row_s > 0 else MOST_ROWS

    def retry_after_s(self, rows: int) -> int | None:
        """Whole seconds after which to come again if ``rows`` wait already; None: it may wait."""
        wait = rows * self.row_s
        return round(wait) if wait > LONGEST_WAIT_S else None
