"""How far two versions' answers are apart. Pure.

Scores of classes, arrays of shape (rows, classes), are compared by the class they choose; single
numbers by their size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Answers = np.ndarray[Any, Any]
CLOSE = 1e-3


def drift(a: Answers, b: Answers) -> float:
    """Return how far two samples' distributions are apart, from 0 (equal) to 1.

    Total variation distance of the chosen classes; for single numbers the largest difference of
    the empirical distribution functions (Kolmogorov-Smirnov).
    """
    if not len(a) or not len(b):
        return 0.0
    if _is_scores(a):
        classes = max(a.shape[1], b.shape[1])
        shares = [np.bincount(_chosen(x), minlength=classes) / len(x) for x in (a, b)]
        return float(np.abs(shares[0] - shares[1]).sum() / 2)
    low, high = np.sort(a.reshape(len(a), -1)[:, 0]), np.sort(b.reshape(len(b), -1)[:, 0])
    at = np.concatenate([low, high])
    below = [np.searchsorted(x, at, side="right") / len(x) for x in (low, high)]
    return float(np.abs(below[0] - below[1]).max())


def disagreement(a: Answers, b: Answers) -> float:
    """Return the share of rows, in [0, 1], that two versions answer differently.

    Row i of both is the same request. Numbers differ where they are more than a thousandth of
    their spread apart.
    """
    if not len(a):
        return 0.0
    if _is_scores(a):
        return float((_chosen(a) != _chosen(b)).mean())
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    bound = CLOSE * (float(np.ptp(a)) or float(np.abs(a).max()) or 1.0)
    return float((np.abs(a - b) > bound).any(axis=1).mean())


def _is_scores(values: Answers) -> bool:
    return values.ndim == 2 and values.shape[1] > 1


def _chosen(scores: Answers) -> np.ndarray[Any, np.dtype[np.intp]]:
    return scores.argmax(axis=1)
