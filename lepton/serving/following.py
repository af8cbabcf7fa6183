"""Following the registry's pointer: which versions are in memory, and who answers.

Invariant: a version answers only after its files matched their hashes, and its answers those that
the checkpoint recorded in training; one that cannot be loaded changes nothing for requests.
Weights come and go by swapping one reference; the former champion stays resident, so going back is
as quick.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from lepton import checkpoints, telemetry
from lepton.checkpoints.reading import Unreachable
from lepton.errors import LeptonError
from lepton.export.recorded import compare
from lepton.export.restore import Predictor
from lepton.registry import Pointer, Registry
from lepton.serving.arrays import Arrays, can_read
from lepton.serving.inputs import Input, input_of
from lepton.telemetry import Carrier

FOLLOW_S = 0.25
LONGEST_PAUSE_S = 30.0

log = logging.getLogger("lepton")


@dataclass(frozen=True, eq=False)
class Resident:
    """A version in memory."""

    version: int
    predictor: Predictor
    inputs: tuple[Input, ...]
    traceparent: str
    baggage: str = ""

    @cached_property
    def as_arrays(self) -> bool:
        """Whether its inputs can come as arrays."""
        return can_read(self.inputs)

    @property
    def outputs(self) -> list[str]:
        """The names of what it gives."""
        return [s.name for s in self.predictor.signature.outputs]

    def run(self, rows: pa.Table | Arrays) -> Mapping[str, np.ndarray[Any, Any]]:
        """Return outputs by name, arrays of shape (rows, …), for raw rows."""
        if not isinstance(rows, Arrays):
            found = self.predictor(rows)
        elif self.predictor.preparation is None:
            found = self.predictor.of_arrays(rows.columns)
        else:
            found = self.predictor(rows.table())
        return {name: value.numpy() for name, value in found.items()}


@dataclass(frozen=True)
class Serving:
    """Who answers now; replaced as a whole."""

    champion: Resident
    canary: Resident | None
    shadow: Resident | None
    share: float
    by: str
    seq: int


class Follower:
    """Keeps the versions that the registry's pointer names in memory.

    Args:
        model: the registered name.
        home: where the registry is.
        trace: the span that loads are recorded under.
        device: where nets compute, as torch names it.

    Raises:
        LeptonError: there is no champion, or it cannot be loaded.
    """

    def __init__(self, model: str, home: str, trace: Carrier, device: str = "cpu") -> None:
        self._model = model
        self._trace = trace
        self._device = device
        self._unread = ""
        self._registry = Registry(f"{home}/registry")
        self.resident: dict[int, Resident] = {}
        self.error = ""
        self._failed_seq: int = 0
        self._again_at: float = math.inf
        self._pause_s: float = FOLLOW_S
        self.now = self._load(self._registry.state(model).pointer)
        self.rollbacks = self._rollbacks()
        self._following, self._stop = threading.Lock(), threading.Event()
        threading.Thread(target=self._keep_following, daemon=True).start()

    def follow(self) -> dict[str, Any]:
        """Take up the newest pointer; return what is served and what went wrong, if anything."""
        with self._following:
            self._take_up()
        now = self.now
        return {
            "seq": max(now.seq, self._failed_seq),
            "champion": now.champion.version,
            "canary": now.canary.version if now.canary else None,
            "shadow": now.shadow.version if now.shadow else None,
            "share": now.share,
            "error": self.error,
            "pid": os.getpid(),
        }

    def close(self) -> None:
        """Follow no more."""
        self._stop.set()

    def _keep_following(self) -> None:
        while not self._stop.wait(FOLLOW_S):
            self.follow()

    def _take_up(self) -> None:
        try:
            pointer = self._registry.state(self._model).pointer
        except Exception as e:  # noqa: BLE001 - whatever a store does: it is asked again soon
            if str(e) != self._unread:
                self._unread = str(e)
                log.warning("replica of %s cannot read the registry: %s", self._model, e)
            return
        self._unread = ""
        known = pointer.seq <= max(self.now.seq, self._failed_seq)
        again = pointer.seq == self._failed_seq and time.monotonic() >= self._again_at
        if known and not again:
            return
        try:
            self.now = self._load(pointer)
            self.error, self._pause_s, self._again_at = "", FOLLOW_S, math.inf
            self.rollbacks = self._rollbacks()
        except Exception as e:  # noqa: BLE001 - such as no memory left: it answers as before
            self._failed_seq = pointer.seq
            self._pause(e)
            self.error = str(e) if isinstance(e, LeptonError) else f"{type(e).__name__}: {e}"
            log.warning(
                "replica of %s keeps version %s: %s",
                *(self._model, self.now.champion.version, self.error),
            )

    def _pause(self, error: Exception) -> None:
        """Choose when to try a load again: never, unless its storage was to blame."""
        if not isinstance(error, Unreachable | OSError):
            self._again_at = math.inf
            return
        self._again_at = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def _load(self, pointer: Pointer) -> Serving:
        if pointer.champion is None:
            raise LeptonError(f"model {self._model!r} has no champion: promote a version first")
        champion = self._version(pointer.champion)
        canary, shadow = (
            self._version(number) if number is not None else None
            for number in (pointer.canary, pointer.shadow)
        )
        keep = {pointer.champion, pointer.canary, pointer.shadow, pointer.previous}
        self.resident = {v: r for v, r in self.resident.items() if v in keep}
        return Serving(champion, canary, shadow, pointer.share, pointer.by, pointer.seq)

    def _rollbacks(self) -> int:
        """How often a version of this model was taken back, on trial or as champion."""
        kinds = [event.kind for event in self._registry.history(self._model)]
        return kinds.count("aborted") + kinds.count("rolled_back")

    def _version(self, number: int) -> Resident:
        if number not in self.resident:
            began = time.time_ns()
            self.resident[number] = self._warm(number)
            telemetry.record(
                "lepton.model.load", self._trace, began, attributes={"lepton.version": number}
            )
            seconds = (time.time_ns() - began) / 1e9
            telemetry.measure("lepton.model.load.duration", seconds, {"lepton.model": self._model})
        return self.resident[number]

    def _warm(self, number: int) -> Resident:
        entry = self._registry.version(self._model, number)
        manifest = checkpoints.load(entry.checkpoint)
        if manifest.sha256 != entry.manifest_sha256:
            raise LeptonError(
                f"checkpoint {entry.checkpoint} is not the one that was registered as "
                f"{self._model} version {number}: its manifest has changed"
            )
        predictor = Predictor(manifest, device=self._device)
        compare(predictor.program, manifest)
        types = manifest.lineage.get("types", {})
        filled = predictor.filled
        inputs = tuple(
            input_of(s.name, types.get(s.name, s.dtype), s.shape, nullable=s.name in filled)
            for s in predictor.signature.inputs
        )
        lineage = manifest.lineage
        table = str(lineage.get("table")).rsplit("/", 1)[-1]  # clients need not know where it lies
        words = {
            "lepton.model": self._model,
            "lepton.version": number,
            "lepton.run": lineage.get("run", ""),
            "lepton.table": f"{table}@{lineage.get('table_version')}",
        }
        baggage = Carrier().with_baggage(words).baggage
        return Resident(number, predictor, inputs, manifest.traceparent, baggage)
