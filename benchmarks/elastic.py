"""What a lost worker costs: lepton, torchrun and stock Ray Train, one after another.

``python -m benchmarks.elastic [--quick] [--only PARTS] [--peers NAMES]`` has four parts:

- cost: what lepton's bookkeeping and its checkpoints add to a step, against a bare torch loop
- kills: a worker of three is killed in mid-run with SIGKILL, three times, each peer in turn
- goodput: two minutes of lepton with a kill in each; that of the others is worked out from kills
- changes: two workers added to two, told to go, and lost with their node

What the workers themselves recorded is read. ``results/elastic.json`` and a plot are written after
each piece (``--quick``: elastic-quick); one that fails is written with its reason and the others go
on. It takes fifteen to twenty minutes on two cores: what has not begun after ``--minutes`` is left
out, and said.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks import claims, dots, elastic_changes, elastic_cost, elastic_kills, elastic_pauses
from benchmarks.elastic_changes import Cost
from benchmarks.elastic_kills import Goodput, Loss

PEERS = ("lepton", "torchrun", "ray_train")
PARTS = ("cost", "kills", "goodput", "changes")
PERIODS = 2
KILLS, QUICK_KILLS = 3, 1
"""Of each peer's workers, in one run of it: to start a peer takes longer than a kill."""


@dataclass
class Found:
    """What has been measured so far."""

    cost: dict[str, Any] = field(default_factory=dict[str, Any])
    killed: dict[str, list[Loss]] = field(default_factory=dict[str, list[Loss]])
    goodput: dict[str, Goodput] = field(default_factory=dict[str, Goodput])
    changed: dict[str, dict[str, Cost]] = field(default_factory=dict[str, dict[str, Cost]])
    failed: list[str] = field(default_factory=list[str])

    def claims(self) -> list[claims.Claim]:
        """Return it as claims."""
        made = elastic_kills.claims_of(self.killed)
        made += elastic_kills.goodput_claims(self.goodput)
        made += elastic_changes.claims_of(self.changed)
        made += elastic_cost.claims_of(self.cost) if self.cost else []
        return made + [claims.claim(f"FAILED: {why}", None, None, "") for why in self.failed]


Piece = tuple[str, Callable[[], None]]


def pieces(given: argparse.Namespace, found: Found) -> list[Piece]:
    """Return what is to be measured, in order; each puts what it finds into ``found``."""
    only, peers = given.only.split(","), given.peers.split(",")
    count = QUICK_KILLS if given.quick else KILLS
    period_s = 15.0 if given.quick else 60.0

    def cost() -> None:
        found.cost = elastic_cost.measure(quick=given.quick)

    def kills(peer: str) -> None:
        found.killed.setdefault(peer, []).extend(elastic_kills.kills(peer, count))

    def goodput() -> None:
        found.goodput["lepton"] = elastic_kills.goodput("lepton", period_s, PERIODS)

    def changes(peer: str) -> None:
        elastic_changes.one_site(peer, found.changed.setdefault(peer, {}))

    made: list[Piece] = []
    if "cost" in only:
        made.append(("cost", cost))
    if "kills" in only:
        made += [(f"kills of {p}", lambda p=p: kills(p)) for p in peers]
    if "goodput" in only and "lepton" in peers:
        made.append(("goodput of lepton", goodput))
    if "changes" in only:
        made += [(f"changes of {p}", lambda p=p: changes(p)) for p in peers]
    return made


def run(piece: Piece, found: Found, *, late: bool) -> None:
    """Measure a piece; what goes wrong is noted."""
    name, measure = piece
    if late:
        found.failed.append(f"{name}: no time was left")
        return
    began = time.monotonic()
    try:
        measure()
    except Exception as e:  # noqa: BLE001 - whatever it is, the other pieces go on
        found.failed.append(f"{name}: {type(e).__name__}: {e}")
    said = found.failed[-1] if found.failed and found.failed[-1].startswith(name) else name
    print(f"{said} ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)


def main() -> None:
    """Measure everything and write it down as it comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one run of one kill a peer")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--minutes", type=float, default=15.0, help="no piece begins after these")
    given = parser.parse_args()
    name = "elastic-quick" if given.quick else "elastic"
    found = Found()
    begun = time.monotonic()
    for piece in pieces(given, found):
        run(piece, found, late=time.monotonic() - begun > given.minutes * 60)
        stamp = {"commit": claims.commit(), "machine": claims.machine()}
        claims.write([{**c, **stamp} for c in found.claims()], f"{name}.json")
        pauses = elastic_pauses.pauses_of(found.killed, found.changed)
        if pauses:
            dots.draw(pauses, claims.RESULTS / f"{name}.png", "seconds without a new step")
    claims.record(found.claims(), name)


if __name__ == "__main__":
    main()
