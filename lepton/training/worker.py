"""The worker: what a person's training loop holds in its hands. Runs with or without Ray.

Invariant: a step happens on every rank or on none that counts. The global batch and the weight of
each row do not depend on the world size: losses are summed over rows, gradients summed over ranks
and divided by the rows of the global batch.

A peer that goes away in mid-step costs that try alone: the survivors come together as the next
generation, put back what the try left behind, and get the same global batch once more, in larger
slices.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from lepton.errors import CheckpointError, TrainingError
from lepton.stream import Part
from lepton.stream.mixture import MixedPart
from lepton.training import sharding, state
from lepton.training.attached import Attached
from lepton.training.beginning import begin
from lepton.training.boundary import Act, Due, after_step, at_end
from lepton.training.exact import Closure
from lepton.training.examination import Examination
from lepton.training.gradients import Summed
from lepton.training.group import Group, PeerLost, Rewound, device_here
from lepton.training.journal import Epoch, Journal
from lepton.training.plan import Opener, Plan
from lepton.training.refusals import not_finite, uneven
from lepton.training.rows import Rows
from lepton.training.saving import Saver
from lepton.training.seat import Place, Seat
from lepton.training.summation import Summation
from lepton.training.watcher import Watcher

LOST_S = 5.0
"""How long the word of a lost peer may take after a collective broke because of it."""


class Worker:
    """One rank of a training run.

    Attributes:
        device: where batches and attached nets are.
    """

    def __init__(self, plan: Plan, rows: Opener, seat: Seat | None = None) -> None:
        self.device = device_here()
        self._plan = plan
        self._group = Group(seat, self.device)
        self._rows = Rows(rows, self._group, self.device)
        self._journal = Journal(plan, self._group)
        self._saver = Saver(plan)
        self._attached = Attached()
        self._sums = Summation(plan, {}, self._group)
        self._watcher = Watcher(lambda: self._batch)
        self._examination = Examination(plan, self._group, {}, self._watcher, self.device)
        self._part: Part | MixedPart | None = None
        self._before: state.Before | None = None
        self._due = Due()
        self._batch: dict[str, Any] = {}
        self._step = self._saved_step = 0
        self._cursor: Mapping[str, Any] | None = None
        self._metrics: dict[str, float] = {}
        self._exhausted = False
        self._met: Place | None = None
        self._mesh: DeviceMesh | None = None

    @property
    def rank(self) -> int:
        """Among the workers, from 0. It may change with every step, as the world size may."""
        return self._group.rank

    @property
    def world_size(self) -> int:
        """Workers that make the steps together now."""
        return self._group.world_size

    @property
    def step_number(self) -> int:
        """Optimiser steps made so far, over all attempts."""
        return self._step

    @property
    def mesh(self) -> DeviceMesh:
        """All workers in a row, to shard a net over: ``fully_shard(net, mesh=worker.mesh)``.

        To be asked for before :meth:`attach`: here the worker meets the others. When workers are
        lost, come or leave then, the loop is run again from its top, from the newest checkpoint.
        """
        if self._met is None:
            if self._attached:
                raise TrainingError("ask for worker.mesh before worker.attach(...)")
            sharding.refuse(self._plan)
            self._met = self._group.meet(None)
            self._mesh = sharding.mesh_of(self._group, self.device)
        assert self._mesh is not None  # noqa: S101 - made above
        return self._mesh

    def attach(self, **objects: Any) -> None:
        """Give nets, optimisers and anything else with a ``state_dict`` into lepton's care.

        Nets go to this worker's device and start equal on every rank; everything attached is in
        each checkpoint, is restored when the run resumes, and is handed to workers that join
        later. Call it once, before ``batches()``: here the worker meets the others.

        Raises:
            TrainingError: called too late, twice, or with something that has no state.
            CheckpointError: the run's checkpoint holds other things than these.
        """
        if self._attached or self._part is not None:
            raise TrainingError("worker.attach(...) is called once, before worker.batches()")
        self._attached = Attached(objects)
        self._sums = Summation(self._plan, self._attached.nets, self._group)
        told = (self._plan, self._group, self._attached, self._watcher, self.device)
        self._examination = Examination(*told)
        for net in self._attached.nets.values():
            net.to(self.device)
        if self._met is None:
            sharding.refuse_unmet(self._attached.nets.values())
            self._join(None)
        else:
            self._settle(self._met)
        torch.manual_seed(hash((self._plan.seed, self.rank, self._step)) % 2**63)
        for name, net in self._attached.nets.items():
            self._watcher.watch(name, net, objects[name])

    def batches(self) -> Iterator[dict[str, Any]]:
        """Yield this rank's slice of each global batch: column name to tensor, on the device.

        Every rank makes the same number of steps; in a short last batch a slice may be empty.
        After a peer was lost in mid-step, the same global batch comes again, sliced anew.

        Raises:
            TrainingError: nothing attached, or a batch was not followed by ``worker.step``.
        """
        if not self._attached:
            raise TrainingError("call worker.attach(net=..., opt=...) before worker.batches()")
        while True:
            if self._part is not None:
                raise TrainingError(
                    "the loop asked for the next batch without worker.step(loss) for the last "
                    "one: call worker.step(loss) once for each batch"
                )
            self._cross_boundary()
            self._journal.ask()
            if self._met is None:  # a sharded net waits for the others all along
                self._group.part.begin()
            if self._examination.stops:
                self._exhausted = True
                self._journal.end_epoch(self._step)
                return
            try:
                part = self._rows.next_part()
            except PeerLost:  # while agreeing on the version of a followed table
                self._lose()
                continue
            if part is None:
                self._exhausted = True
                self._journal.end_epoch(self._step)
                return
            self._journal.turn_to(part.epoch, self._step)
            if self._group.seat is not None and self._met is None:
                self._before = state.Before(self._attached)
            self._part = part
            self._batch = self._rows.on_device(part)
            yield self._batch

    def step(
        self,
        loss: torch.Tensor | Closure,
        *,
        clip: float | None = None,
        update: Callable[[], None] | None = None,
    ) -> float:
        """Make one optimiser step together with all ranks; return the global batch's mean loss.

        If a peer went away the step is not made: ``batches()`` yields the same global batch
        again, and the mean over this rank's rows is returned meanwhile.

        Args:
            loss: the *sum* of the losses of this rank's rows (``reduction="sum"``), a scalar.
                A loss without a graph has been back-propagated by the loop itself, in as many
                pieces as it liked (gradient accumulation). Or a function of a batch that returns
                it, which ``exact=True`` needs.
            clip: largest norm of the mean gradient over all attached nets; default unlimited.
            update: makes the step in place of every attached optimiser's ``step()``; the
                gradients are means over the global batch by then.

        Raises:
            TrainingError: no batch under way, a loss that is not a scalar tensor, or not a finite
                number: then the last good step is checkpointed first.
        """
        part = self._part
        if part is None:
            raise TrainingError("worker.step(loss) needs a batch from worker.batches() before it")
        self._journal.contribute(self._step + 1, part)
        try:
            found = self._sums.make(loss, part, self._batch, self._step)
            if found.ended:
                raise TrainingError(uneven(found.ended, self.world_size, self._step))
            if not math.isfinite(found.mean):
                self._refuse(part)
        except PeerLost:
            self._lose()
            return float(self._sums.local) / max(1, part.delivered)
        self._attached.make_step(clip, update)
        self._sums.clear()
        self._made(found)
        return found.mean

    def log(self, **metrics: float) -> None:
        """Add figures to the next checkpoint's metrics (those of rank 0 are kept)."""
        self._metrics.update({k: float(v) for k, v in metrics.items()})

    def finish(self) -> None:
        """End the run: write the last checkpoint. The trainer calls it after the loop.

        Raises:
            TrainingError: the loop never made a step, or ranks made different numbers of them.
        """
        if self._part is not None:
            raise TrainingError("the loop ended between a batch and its worker.step(loss)")
        if self._step == 0:
            raise TrainingError(
                "the loop made no step: iterate over worker.batches() and call worker.step(loss)"
            )
        self._due = at_end(self._due, exhausted=self._exhausted)
        self._cross_boundary()
        while not self._ends_together():
            self._join(self._step)
        self._journal.end()

    def give_up(self) -> None:
        """End without finishing: what was begun to be saved is saved. The trainer calls it."""
        self._saver.abandon()
        with suppress(CheckpointError):
            self._saver.wait()
        self._journal.close()
        self._journal.end()
        self._rows.close()
        if self._met is not None and self._group.seat is None:
            self._group.leave()  # this process goes on to do other things

    def leave(self) -> None:
        """Let go of the ranks, in mid-run: another worker takes this one's place."""
        self._attached, self._mesh = Attached(), None
        self.give_up()
        self._group.leave()

    def has_lost_peer(self, error: RuntimeError) -> bool:
        """Whether an error out of the loop comes from a peer that went away, in a sharded run."""
        if self._met is None:
            return False
        return isinstance(error, PeerLost) or self._group.has_lost(LOST_S)

    def _ends_together(self) -> bool:
        """Settle the end with the other ranks, the last checkpoint written; False: try again."""
        if not self._exhausted and self.world_size > 1:
            try:
                found = self._sums.end()
            except PeerLost:
                return False
            if found.ended < self.world_size:
                raise TrainingError(uneven(found.ended, self.world_size, self._step))
        if self._met is not None:
            self._checkpoint()
        newest = self._saver.wait()
        if self.rank == 0:
            if newest is None or newest.step != self._step:
                if self._met is not None:
                    raise PeerLost(f"step {self._step} was not kept")
                self._checkpoint()
            self._saver.finish(self._step, self._cursor, self._examination.verdict)
        return self._group.seat is None or self._group.seat.done(self._step)

    # -- generations ----------------------------------------------------------------------------

    def _join(self, step: int | None) -> None:
        """Join the next generation, however often it takes."""
        if self._met is not None:
            raise Rewound
        if step is not None:
            self._journal.interrupted(lost=False)
        self._group.meet(step, self._settle)

    def _settle(self, place: Place) -> None:
        self._journal.met()
        if place.source is None:
            self._begin()
        elif place.behind:
            epoch = self._journal.epoch
            mine = (self._step, self._cursor, epoch.number, epoch.began_ns)
            found = state.hand_over(self._attached, self._group, mine)
            if place.rank in place.behind:
                self._step, self._cursor = found[:2]
                self._journal.epoch = Epoch(*found[2:])
        self._journal.held()
        self._group.stands_at(self._step)
        self._saver.frozen.look(self._attached)
        self._examination.settle()
        self._rows.open(self._cursor, self._journal.open(self._step))

    def _begin(self) -> None:
        """Start from the newest checkpoint, or equal on every rank."""
        saved = begin(self._plan, self._group, self._attached, sharded=self._met is not None)
        if saved is not None:
            self._saver.saved = saved
            self._step = self._saved_step = saved.step
            self._cursor = saved.cursor
            self._journal.epoch = Epoch(int(saved.cursor["epoch"]), time.time_ns())
        self._examination.resume(saved.step if saved else 0, saved.signature if saved else None)
        if self.rank == 0:
            self._journal.resumed(saved.step if saved else 0)

    def _lose(self) -> None:
        """A peer went away: come together at the boundary, when the loop's body is done."""
        self._journal.interrupted(lost=True)
        self._due = Due(lost=True)
        self._part = None

    def _cross_boundary(self) -> None:
        """Do between steps what is due there: here the loop's own state is that of a whole step.

        (Inside of ``step`` it is not: a schedule is stepped on after it.)
        """
        due, self._due = self._due, Due()
        before, self._before = self._before, None
        if before is not None:
            before.restore()
            self._sums.clear()
        for act in due.acts(sharded=self._met is not None):
            match act:
                case Act.JUDGE:
                    self._examine()
                case Act.CHECKPOINT:
                    self._checkpoint()
                case Act.WAIT:
                    self._saver.wait()
                case Act.JOIN:
                    self._join(self._step)
        if self._examination.is_best(self._step):
            self._checkpoint()

    def _examine(self) -> None:
        """Judge the nets if that is due, however often a peer goes away meanwhile."""
        self._batch = {}
        while self._examination.is_due(self._step):
            try:
                self._journal.judged(self._examination.take(self._step, self._journal.epoch.number))
            except PeerLost:
                self._journal.interrupted(lost=True)
                self._join(self._step)

    # -- a step ---------------------------------------------------------------------------------

    def _refuse(self, part: Part | MixedPart) -> None:
        """Stop at a loss that is no finite number, with the last good step on disk."""
        mine = [] if math.isfinite(float(self._sums.local)) else [int(i) for i in part.ids[:8]]
        guilty = {r: ids for r, ids in enumerate(self._group.gather(mine)) if ids}
        self._sums.clear()
        if self._step:
            self._checkpoint()
            self._saver.wait()
        raise TrainingError(not_finite(self._plan.lineage, self._step, part, guilty))

    def _made(self, found: Summed) -> None:
        self._step += 1
        self._cursor = self._rows.cursor
        self._part = self._before = None
        self._journal.made(self._step, found.mean)
        self._metrics["loss"] = found.mean
        every = self._plan.checkpoint_every
        self._due = after_step(self._step, every, called=found.called, leaving=found.leaving)
        self._group.stands_at(self._step)

    # -- checkpoints ----------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        """Rank 0 writes, where the state is equal everywhere; every rank its part, where not."""
        if self._cursor is None or self._saved_step == self._step:
            return
        if self.rank != 0 and self._met is None:
            return
        self._saved_step = self._step
        figures = {**self._metrics, **self._examination.figures(self._step)}
        told = (self._step, self._attached, self._cursor, self._watcher, figures)
        if self._met is None:
            self._saver.save(*told)
        else:
            self._saver.save_shards(*told, self._group)
