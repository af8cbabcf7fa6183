"""Following the registry's pointer: which versions are in memory, and who answers.

Invariant: a version answers only after its files matched their hashes, and its answers those that
the checkpoint recorded in training; one that cannot be loaded changes nothing for requests.
Weights come and go by swapping one reference; the former champion stays resident, so going back is
as quick.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from lepton import checkpoints, telemetry
from lepton.checkpoints import Manifest
from lepton.checkpoints.reading import Unreachable
from lepton.errors import LeptonError
from lepton.export.recorded import compare
from lepton.export.restore import Predictor
from lepton.registry import ModelVersion, Pointer, Registry, asked_for_by
from lepton.serving.arrays import Arrays, can_read
from lepton.serving.inputs import Input, input_of
from lepton.serving.room import NoRoom, Room, weights_of
from lepton.telemetry import Carrier, carrier_of

FOLLOW_S = 0.25
LONGEST_PAUSE_S = 30.0
LONGEST_END_S = 5.0
"""How long the end of a replica waits for a version that is being loaded just now."""

log = logging.getLogger("lepton")


@dataclass(frozen=True, eq=False)
class Resident:
    """A version in memory.

    Attributes:
        traceparent: of its checkpoint. deployment: of what brought it into memory.
        weights: bytes.
    """

    version: int
    predictor: Predictor
    inputs: tuple[Input, ...]
    traceparent: str
    baggage: str = ""
    weights: int = 0
    deployment: str = ""

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
        trace: the span that loads are recorded under where the registry names none.
        room: where nets compute, and in how much memory.

    Attributes:
        resident: the versions in memory, by their numbers; replaced as a whole, as others look
            through it meanwhile.
        now: who answers.
        error: why the newest pointer is not served, or empty.
        short: that is for want of memory, so :meth:`replace` can help.
        lost: nobody answers any more.

    Raises:
        LeptonError: there is no champion, or it cannot be loaded.
    """

    def __init__(self, model: str, home: str, trace: Carrier, room: Room | None = None) -> None:
        self._model = model
        self._trace = trace
        self._room = room or Room()
        self._unread = ""
        self._registry = Registry(f"{home}/registry")
        self.resident: dict[int, Resident] = {}
        self.error = ""
        self.short = self.lost = False
        self._wanted: set[int] = set()
        self._failed_seq: int = 0
        self._again_at: float = math.inf
        self._pause_s: float = FOLLOW_S
        self.now = self._load(self._registry.state(model).pointer)
        self.rollbacks = self._rollbacks()
        self._following, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep_following, daemon=True)
        self._thread.start()

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
            "short": self.short,
            "pid": os.getpid(),
        }

    def replace(self) -> None:
        """Let go of all versions, then load those of the newest pointer; nobody may ask meanwhile.

        For versions of which two do not fit into memory. If the new one cannot be loaded either,
        the former champion is loaded again, and :attr:`error` says why.

        Raises:
            LeptonError, OSError: that cannot be loaded any more either.
        """
        with self._following:
            pointer = self._registry.state(self._model).pointer
            if pointer.seq <= self.now.seq:
                return
            before = self.now
            self._let_go()
            try:
                self._serve(pointer)
            except Exception as e:  # noqa: BLE001 - it is told by follow()
                self._refuse(pointer, e)
                self._let_go()
                self.lost = True
                champion = self._version(before.champion.version)
                self.now = Serving(champion, None, None, 0.0, "", before.seq)
                self.lost = False

    def _let_go(self) -> None:
        for resident in self.resident.values():
            resident.predictor.program.release()
        self.resident = {}
        gc.collect()  # what is left of them in cycles
        self._room.emptied()

    def close(self) -> None:
        """Follow no more; the interpreter must not end while a thread reads a table."""
        self._stop.set()
        self._thread.join(LONGEST_END_S)

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
            self._serve(pointer)
        except Exception as e:  # noqa: BLE001 - such as no memory left: it answers as before
            self._refuse(pointer, e)

    def _serve(self, pointer: Pointer) -> None:
        self.now = self._load(pointer)
        self.error, self._pause_s, self._again_at = "", FOLLOW_S, math.inf
        self.short = False
        self.rollbacks = self._rollbacks()

    def _refuse(self, pointer: Pointer, error: Exception) -> None:
        self._failed_seq = pointer.seq
        self._pause(error)
        told = isinstance(error, LeptonError)
        self.error = str(error) if told else f"{type(error).__name__}: {error}"
        self.short = isinstance(error, NoRoom)
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
        on_trial = {pointer.canary, pointer.shadow}
        self._wanted = {pointer.champion, *(v for v in on_trial if v is not None)}
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
            entry = self._registry.version(self._model, number)
            asked_for = asked_for_by(self._registry.history(self._model), number)
            under = carrier_of(asked_for, self._trace.directory, self._trace)
            about = {"lepton.model": self._model, "lepton.version": number}
            links = [str(entry.lineage.get("traceparent", ""))]
            began = time.time_ns()
            with telemetry.span("lepton.model.load", under, attributes=about, links=links):
                warm = replace(self._warm(entry), deployment=under.trace_id and under.traceparent)
                self.resident = {**self.resident, number: warm}
            seconds = (time.time_ns() - began) / 1e9
            telemetry.measure("lepton.model.load.duration", seconds, {"lepton.model": self._model})
        return self.resident[number]

    def _warm(self, entry: ModelVersion) -> Resident:
        number, manifest = entry.version, manifest_of(entry)
        self._make_room(number, manifest)
        return resident_of(entry, manifest, self._room.device)

    def _make_room(self, number: int, manifest: Manifest) -> None:
        """See that a version fits in; former ones that nobody is given any more go for it.

        Raises:
            NoRoom: it does not fit.
        """
        if not self._lacking(manifest):
            return
        now = getattr(self, "now", None)
        answering = (now.champion, now.canary, now.shadow) if now else ()
        needed = self._wanted | {r.version for r in answering if r}
        for spare in self.resident.keys() - needed:
            self.resident = {v: r for v, r in self.resident.items() if v != spare}
            log.warning(
                "replica of %s lets go of version %d to make room for version %d: going back to it "
                "means loading it again",
                *(self._model, spare, number),
            )
        lacking = self._lacking(manifest)
        if lacking and (self.resident or self._room.most is not None):  # else let it try
            beside = " and ".join(str(v) for v in sorted(self.resident)) or "none"
            raise NoRoom(
                f"{self._model} version {number} ({weights_of(manifest):,} bytes of weights) does "
                f"not fit into memory on {self._room.device}: {lacking:,} bytes are missing; "
                f"versions in memory: {beside}"
            )

    def _lacking(self, manifest: Manifest) -> int:
        held = sum(r.weights for r in self.resident.values())
        return self._room.lacking(held, manifest)


def manifest_of(entry: ModelVersion) -> Manifest:
    """Return the manifest of a version's checkpoint.

    Raises:
        LeptonError: it is not the one that was registered.
    """
    manifest = checkpoints.load(entry.checkpoint)
    if manifest.sha256 != entry.manifest_sha256:
        raise LeptonError(
            f"checkpoint {entry.checkpoint} is not the one that was registered as "
            f"{entry.model} version {entry.version}: its manifest has changed"
        )
    return manifest


def resident_of(entry: ModelVersion, manifest: Manifest, device: str) -> Resident:
    """Load a version into memory, and ask it what the checkpoint recorded in training.

    Raises:
        LeptonError: a file does not match its hash, or an answer is another one.
    """
    predictor = Predictor(manifest, device=device)
    compare(predictor.program, manifest)
    lineage = manifest.lineage
    types = lineage.get("types", {})
    filled = predictor.filled
    inputs = tuple(
        input_of(s.name, types.get(s.name, s.dtype), s.shape, nullable=s.name in filled)
        for s in predictor.signature.inputs
    )
    table = str(lineage.get("table")).rsplit("/", 1)[-1]  # clients need not know where it lies
    words = {
        "lepton.model": entry.model,
        "lepton.version": entry.version,
        "lepton.run": lineage.get("run", ""),
        "lepton.table": f"{table}@{lineage.get('table_version')}",
    }
    baggage = Carrier().with_baggage(words).baggage
    weights = weights_of(manifest)
    return Resident(entry.version, predictor, inputs, manifest.traceparent, baggage, weights)
