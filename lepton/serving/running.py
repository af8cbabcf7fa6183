"""What runs on Ray Serve, as several threads of one process may ask at once.

Serve marks a policy's module for cloudpickle while it serializes the policy, as every look at the
status does, and then takes the mark away: of two threads the second one finds none to take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ray import serve

MOST_TRIES = 20
_MARK_GONE = "is not registered for pickle by value"

T = TypeVar("T")


def status() -> Any:
    """Return Serve's status."""
    return undisturbed(serve.status)


def undisturbed(call: Callable[[], T]) -> T:
    """Return what a call of Serve returns, made again where another thread disturbed it.

    Nothing has reached Serve by then.
    """
    for _ in range(MOST_TRIES - 1):
        try:
            return call()
        except ValueError as e:
            if _MARK_GONE not in str(e):
                raise
    return call()
