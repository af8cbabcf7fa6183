"""Taking a pointer up: beside the version that answers or, where two do not fit, one by one.

Invariant: a replica lets go of the version that it has only while another one answers requests.
Whose process dies here leaves replicas that answer with what they have; promoting that version
again carries on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lepton.errors import ServingError
from lepton.registry import ModelState, Registry
from lepton.serving import App
from lepton.serving.client import ShortOfMemory
from lepton.telemetry import Carrier

WAIT_S = 180.0
LOOK_S = 0.2

Told = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Turns:
    """How the replicas of an application take up a pointer.

    Attributes:
        app: asked about its replicas.
        registry: gets a record of it.
        tell: told of each replica in a few words.
        carrier: of the span under which it happens.
    """

    app: App
    registry: Registry
    tell: Callable[[str], None]
    carrier: Carrier = field(default_factory=Carrier)

    def settle(self, state: ModelState) -> None:
        """Wait until every replica serves the pointer.

        Raises:
            ShortOfMemory: a version on trial does not fit beside the champion; or there is only one
                replica, which may not be let go of.
            ServingError: a replica cannot take it up; the message says why.
        """
        pointer = state.pointer
        try:
            self.app.wait_for(pointer.seq)
        except ShortOfMemory as e:
            if pointer.trial is not None:
                raise ShortOfMemory(
                    f"{e}; a version on trial has to be there beside the champion: promote it "
                    "without canary= and shadow=, and replicas are replaced one after another"
                ) from e
            self._replace_all(state, str(e))

    def finish(self, state: ModelState) -> None:
        """Carry on where replacing was left off; raises as :meth:`settle`."""
        if state.pointer.trial is None and any(r["short"] for r in self.app.replicas()):
            self._replace_all(state, "carried on: the one who began was ended")

    def _replace_all(self, state: ModelState, why: str) -> None:
        began, replaced, surge = time.monotonic(), 0, False
        version = state.pointer.champion or 0
        try:
            while behind := self._behind(state.pointer.seq):
                found = self.app.replicas()
                if len(found) < 2:
                    self._surge(found, why)
                    surge = True
                    continue
                self._wait_for_another(behind[0])
                self._replace(behind[0])
                replaced += 1
                self.tell(f"version {version} in {replaced} of {len(found)} replicas, one by one")
        finally:
            if surge:
                self.app.wish(0)
        seconds = round(time.monotonic() - began, 3)
        self.registry.replaced(
            self.app.model,
            version,
            details={"replicas": replaced, "surge": surge, "seconds": seconds},
            reason=why,
            trace_id=self.carrier.trace_id,
        )

    def _behind(self, seq: int) -> list[Told]:
        return [r for r in self.app.replicas() if r["short"] or r["seq"] < seq]

    def _replace(self, one: Told) -> None:
        done = self.app.replace(one["id"])
        if done is not None and done["error"]:
            raise ServingError(
                f"a replica of {self.app.model!r} that was replaced alone serves version "
                f"{done['champion']}: {done['error']}"
            )

    def _surge(self, found: Sequence[Told], why: str) -> None:
        """Have another replica started, as there is only one.

        Raises:
            ShortOfMemory: there may be no other, or none came up.
        """
        if found and found[0]["most"] < 2:
            raise ShortOfMemory(
                f"{why}; with one replica nobody would answer while it is replaced: let it have a "
                "second one meanwhile by replicas=(1, 2) when the application is started, or give "
                "its replicas more memory"
            )
        self.app.wish(2)
        if not _comes_true(lambda: len(self.app.replicas()) > 1):
            raise ShortOfMemory(
                f"{why}; no second replica came up within {WAIT_S:.0f} s to answer while the only "
                "one is replaced: has the cluster room for it?"
            )

    def _wait_for_another(self, one: Told) -> None:
        """Wait until the ingress sends requests to another replica.

        Raises:
            ServingError: it does not.
        """
        own = ("", str(one["pid"]))
        if not _comes_true(lambda: self.app.reached() not in own):
            raise ServingError(
                f"no other replica of {self.app.model!r} is reached at {self.app.url}, so none is "
                "replaced: nobody would answer"
            )


def _comes_true(condition: Callable[[], bool]) -> bool:
    """Wait for a condition; return whether it held in time."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(LOOK_S)
    return False
