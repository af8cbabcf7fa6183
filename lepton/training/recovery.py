"""Which failures can be mended, and how many are too many. Pure.

A worker that vanished (killed, its node lost) is mended by starting again from the newest
checkpoint; so are the errors that its going causes in its peers. An exception in the person's own
code would only come again, so the run ends with it at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

VANISHED = (
    "WorkerHealthCheckFailedError",
    "WorkerHealthCheckTimeoutError",
    "RayActorError",
    "NodeDiedError",
)
COLLATERAL = ("Stopped", "PeerLost", "DistNetworkError", "DistBackendError", "DistStoreError")


def fatal_rank(errors: Mapping[int, Sequence[str]]) -> int | None:
    """Return the rank whose error ends the run, or None if a restart can mend them all.

    Args:
        errors: by rank, the class names of its error and of the chain of its causes.
    """
    if any(set(names) & set(VANISHED) for names in errors.values()):
        return None
    for rank, names in sorted(errors.items()):
        if not set(names) & set(COLLATERAL):
            return rank
    return None


def in_a_row(losses: Sequence[int], progress: int) -> int:
    """Return how many workers were lost lately without the run getting on in between.

    Args:
        losses: the step at which each worker was lost, in order.
        progress: steps that count as getting on.
    """
    return sum(step > losses[-1] - progress for step in losses) if losses else 0
