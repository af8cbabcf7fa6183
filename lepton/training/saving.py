"""Writing checkpoints beside training: the step waits for the copy, not for the disk."""

from __future__ import annotations

import json
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lepton import checkpoints, telemetry
from lepton.checkpoints import Manifest
from lepton.export.recorded import Twin
from lepton.training import portions, sharding
from lepton.training.frozen import Frozen
from lepton.training.group import Group
from lepton.training.plan import Plan
from lepton.training.retention import thin_out
from lepton.training.watcher import Watcher

LATE_S = 10.0
"""How long rank 0 waits for others to finish writing when the worker ends otherwise than well."""


class Saver:
    """Writes one checkpoint at a time, in a thread, from a copy of the state.

    The copy's memory is used again for the next one, so a checkpoint waits for the one before.

    Args:
        plan: of the run.

    Attributes:
        saved: the newest that was committed here.
        frozen: what checkpoints only refer to.
    """

    def __init__(self, plan: Plan) -> None:
        self.saved: Manifest | None = None
        self.frozen = Frozen(plan)
        self._plan = plan
        self._copy: dict[str, torch.Tensor] = {}
        self._gathered = False
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._saved_at: float | None = None
        self._abandoned_at: float | None = None
        myself = weakref.ref(self)

        def age() -> float | None:
            saver = myself()
            at = saver._saved_at if saver else None
            return None if at is None else time.monotonic() - at

        telemetry.watch("lepton.checkpoint.age", age)

    def save(
        self,
        step: int,
        attached: Mapping[str, Any],
        cursor: Mapping[str, Any],
        watcher: Watcher,
        metrics: Mapping[str, float],
    ) -> None:
        """Copy the state and begin to write it.

        Args:
            step: optimiser steps made.
            attached: name to what has a state.
            cursor: where the stream stands.
            watcher: knows what feeds the net; exports it, the first time.
            metrics: figures known at this step.

        Raises:
            CheckpointError: the state cannot be held, or the checkpoint before failed.
        """
        self.wait()
        state = {name: thing.state_dict() for name, thing in attached.items()}
        frozen = self.frozen.of(attached)
        began = time.time_ns()
        self._copy, tree = checkpoints.flatten(state, self._copy, leave=frozen)
        copied = (began, time.time_ns())
        described = self._described(cursor, watcher, metrics)
        self._thread = threading.Thread(
            target=self._write,
            args=((self._copy, tree), frozen, step, described, watcher.twin, copied),
            name="lepton-checkpoint",
        )
        self._thread.start()

    def save_shards(
        self,
        step: int,
        attached: Mapping[str, Any],
        cursor: Mapping[str, Any],
        watcher: Watcher,
        metrics: Mapping[str, float],
        group: Group,
    ) -> None:
        """Copy this rank's portion and begin to write it; rank 0 commits all of them.

        Only the first one is collective, as the net is exported with whole parameters.

        Args:
            step: as :meth:`save` takes it, and so are the next four.
            attached: name to what has a state.
            cursor: where the stream stands.
            watcher: exports the net, the first time.
            metrics: figures known at this step.
            group: the ranks.

        Raises:
            CheckpointError: the state cannot be held, or the checkpoint before failed.
            PeerLost: a worker went away; nothing will be committed.
        """
        self.wait()
        first = group.rank == 0
        if not self._gathered:
            self._gathered = True
            for name, net in attached.items():
                if isinstance(net, torch.nn.Module):
                    plain = sharding.gathered(net, keep=first)
                    if plain is not None:
                        watcher.stand_in(name, plain)
        portion = portions.copied(attached, group, step, self._copy)
        described = self._described(cursor, watcher, metrics) if first else {}
        self._thread = threading.Thread(
            target=self._write_portion, args=(portion, described, group), name="lepton-checkpoint"
        )
        self._thread.start()

    def abandon(self) -> None:
        """Wait for other ranks' portions no longer than :data:`LATE_S`: they may have ended."""
        self._abandoned_at = time.monotonic()

    def _write_portion(
        self, portion: portions.Portion, described: dict[str, Any], group: Group
    ) -> None:
        began = time.monotonic()

        def gone() -> bool:
            at = self._abandoned_at
            return group.has_lost(0) or (at is not None and time.monotonic() > at + LATE_S)

        try:
            portions.write(self._plan, portion)
            if portion.rank != 0:
                return
            with telemetry.span(
                "lepton.checkpoint", self._plan.carrier, attributes={"lepton.step": portion.step}
            ) as span:
                described["traceparent"] = span.carrier.traceparent
                program = described.pop("program")
                described["shared"] = self.frozen.entries({}, portion.step, program)
                saved = portions.commit(self._plan, portion, described, gone)
                if saved is not None:
                    span.set(lepton_bytes=saved.own_size)
                    self.saved = saved
                    self._note(saved, began)
        except Exception as e:  # noqa: BLE001 - raised in the training thread, by the next wait
            self._error = e

    def _described(
        self, cursor: Mapping[str, Any], watcher: Watcher, metrics: Mapping[str, float]
    ) -> dict[str, Any]:
        """Return what a manifest says beside the state."""
        program = Path(self._plan.folder) / checkpoints.PROGRAM
        signature, error = watcher.export(program)
        followed = {} if cursor["version"] is None else {"table_version": cursor["version"]}
        return {
            "cursor": dict(cursor),
            "program": program if signature else None,
            "lineage": {**self._plan.lineage, **followed},
            "preparation": self._plan.preparation,
            "signature": signature.to_dict() if signature else None,
            "program_error": error,
            "metrics": dict(metrics),
        }

    def finish(
        self, step: int, cursor: Mapping[str, Any] | None, verdict: Mapping[str, Any]
    ) -> None:
        """Wait for the last checkpoint, then note that the run has come to its end.

        Args:
            step: optimiser steps made.
            cursor: where the stream stands.
            verdict: why it has ended early; empty if it has not.

        Raises:
            CheckpointError: it could not be written.
        """
        self.wait()
        self._saved_at = None  # no other will follow
        target = Path(self._plan.folder) / "done.json"
        target.with_suffix(".tmp").write_text(
            json.dumps({"step": step, "cursor": cursor, **verdict})
        )
        target.with_suffix(".tmp").replace(target)

    def wait(self) -> Manifest | None:
        """Wait until what was begun is committed; return the newest checkpoint made here.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self.saved

    def _write(
        self,
        flat: tuple[Any, Any],
        frozen: dict[str, torch.Tensor],
        step: int,
        described: dict[str, Any],
        twin: Twin | None,
        copied: tuple[int, int],
    ) -> None:
        began = time.monotonic()
        try:
            with telemetry.span(
                "lepton.checkpoint", self._plan.carrier, attributes={"lepton.step": step}
            ) as span:
                at = [time.time_ns()]
                shared = self.frozen.entries(frozen, step, described.pop("program"))
                state = checkpoints.joined(flat[1], {**frozen, **flat[0]})
                self.saved = checkpoints.write(
                    self._plan.kept_in,
                    flat,
                    step=step,
                    options=self._plan.options,
                    traceparent=span.carrier.traceparent,
                    answers=twin.answers(state) if twin else None,
                    shared=shared,
                    written=lambda: at.append(time.time_ns()),
                    **described,
                )
                span.set(lepton_bytes=self.saved.own_size)
                telemetry.record("lepton.checkpoint.snapshot", span.carrier, *copied)
                telemetry.record("lepton.checkpoint.write", span.carrier, *at)
                telemetry.record("lepton.checkpoint.commit", span.carrier, at[1])
            self._note(self.saved, began)
        except Exception as e:  # noqa: BLE001 - raised in the training thread, by the next wait
            self._error = e

    def _note(self, saved: Manifest, began: float) -> None:
        """Measure a checkpoint that was committed; let superfluous ones go."""
        self._saved_at = time.monotonic()
        telemetry.measure("lepton.checkpoint.duration", time.monotonic() - began)
        telemetry.measure("lepton.checkpoint.size", saved.own_size)
        if self._plan.keep is not None:
            home = Path(self._plan.folder).parent.parent
            where = (self._plan.kept_in, self._plan.keep, home)
            thin_out(*where, self._plan.stop, self._plan.options, best=self._plan.keep_best)
