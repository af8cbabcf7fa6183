"""Whether two classifiers judged on the same rows differ by more than chance. Pure.

McNemar's test, exact: of the rows that one answers rightly and the other wrongly, either is as
likely to be the right one if they are equally good. Rows that both answer rightly, or both
wrongly, say nothing about which is better.
Source: Q. McNemar, "Note on the sampling error of the difference between correlated proportions or
percentages", Psychometrika 12, 1947; the exact form is a sign test.
"""

from __future__ import annotations

import math

EXACT_UP_TO = 1000


def chance_of(wins: int, losses: int) -> float:
    """Return the probability of at least so many wins among wins + losses fair coins.

    Beyond :data:`EXACT_UP_TO` coins by the normal approximation.

    Raises:
        ValueError: a count is negative.
    """
    if wins < 0 or losses < 0:
        raise ValueError(f"counts must be at least 0, not {wins} and {losses}")
    total = wins + losses
    if wins == 0:
        return 1.0
    if total > EXACT_UP_TO:
        deviations = (wins - 0.5 - total / 2) / math.sqrt(total / 4)
        return 0.5 * math.erfc(deviations / math.sqrt(2))
    return sum(math.comb(total, k) for k in range(wins, total + 1)) / 2**total
