"""The pauses: seconds without a new step, by what happened and by peer."""

from __future__ import annotations

from benchmarks.elastic_changes import WORDS, Cost
from benchmarks.elastic_kills import Loss

Pauses = dict[str, dict[str, list[float]]]


def pauses_of(killed: dict[str, list[Loss]], changed: dict[str, dict[str, Cost]]) -> Pauses:
    """Return the seconds without a new step; of what has been measured so far."""
    found: Pauses = {
        "worker killed": {
            p: [x.cost.pause for x in losses if x.cost.pause is not None]
            for p, losses in killed.items()
        }
    }
    for change, words in WORDS.items():
        found[words] = {
            peer: [
                cost.pause
                for name, cost in run.items()
                if name.split()[0] == change and cost.pause is not None
            ]
            for peer, run in changed.items()
        }
    return {what: by_peer for what, by_peer in found.items() if any(by_peer.values())}
