"""The worker: what a person's training loop holds in its hands. Runs with or without Ray.

Invariant: a step happens on every rank or on none that counts. The global batch and the weight of
each row do not depend on the world size: losses are summed over rows, gradients summed over ranks
and divided by the rows of the global batch.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from lepton import checkpoints, telemetry
from lepton.errors import CheckpointError, TrainingError
from lepton.stream import Part, Shard
from lepton.stream.mixture import MixedPart, MixedShard
from lepton.telemetry import Carrier
from lepton.training.steps import (
    Attempt,
    Step,
    StepLog,
    attempts_of,
    steps_of,
    write_attempt,
)
from lepton.training.watcher import Watcher


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every worker of a run is told.

    Attributes:
        folder: the run's folder.
        checkpoint_every: steps between checkpoints.
        audit: keep the identity of every consumed row in the step log.
        lineage: recorded in every checkpoint.
        preparation: JSON of the preparation, or None.
        carrier: the run's span.
        session: id of this call of train(): attempts that share it follow a failure.
        seed: for torch's random numbers, mixed with rank and step.
    """

    folder: str
    checkpoint_every: int
    audit: bool
    lineage: Mapping[str, Any]
    preparation: str | None
    carrier: Carrier
    session: str
    seed: int


class PeerLost(RuntimeError):  # noqa: N818 - the event, not the person's mistake
    """A collective broke because another worker went away; the group restarts."""


@dataclass
class _Progress:
    step: int = 0
    epoch_began_ns: int = 0
    epoch: int = -1


class Worker:
    """One rank of a training run.

    Attributes:
        rank: from 0.
        world_size: workers in this attempt.
        device: where batches and attached nets are.
        step_number: optimiser steps made so far.
    """

    def __init__(
        self, plan: Plan, shard: Shard | MixedShard, *, rank: int = 0, world_size: int = 1
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = _device()
        self._plan = plan
        self._shard = shard
        self._attached: dict[str, Any] = {}
        self._watcher = Watcher(lambda: self._batch)
        self._part: Part | MixedPart | None = None
        self._batch: dict[str, Any] = {}
        self._progress = _Progress()
        self._saved: checkpoints.Manifest | None = None
        self._metrics: dict[str, float] = {}
        self._former: Attempt | None = None
        self._shard.agree = self._version_of_rank_0
        self._shard.pin = self.device.type == "cuda"  # a batch is held until its step is done
        self._begin()

    @property
    def step_number(self) -> int:
        """Optimiser steps made so far, over all attempts."""
        return self._progress.step

    def attach(self, **objects: Any) -> None:
        """Give nets, optimisers and anything else with a ``state_dict`` into lepton's care.

        Nets go to this worker's device and start equal on every rank; everything attached is in
        each checkpoint and is restored when the run resumes. Call it once, before ``batches()``.

        Raises:
            TrainingError: called too late, twice, or with something that has no state.
            CheckpointError: the run's checkpoint holds other things than these.
        """
        if self._attached or self._part is not None:
            raise TrainingError("worker.attach(...) is called once, before worker.batches()")
        for name, thing in objects.items():
            if not hasattr(thing, "state_dict") or not hasattr(thing, "load_state_dict"):
                raise TrainingError(
                    f"cannot attach {name!r}: a {type(thing).__name__} has no state_dict(); "
                    "attach torch modules, optimisers, schedulers or objects like them"
                )
        self._attached = dict(objects)
        for net in self._nets().values():
            net.to(self.device)
        self._restore()
        self._broadcast()
        torch.manual_seed(hash((self._plan.seed, self.rank, self._progress.step)) % 2**63)
        for name, net in self._nets().items():
            self._watcher.watch(name, net)

    def batches(self) -> Iterator[dict[str, Any]]:
        """Yield this rank's slice of each global batch: column name to tensor, on the device.

        Every rank makes the same number of steps; in a short last batch a slice may be empty.

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
            try:
                part = self._shard.next_part()
            except StopIteration:
                self._end_epoch()
                return
            if part.epoch != self._progress.epoch:
                self._end_epoch()
                self._progress.epoch = part.epoch
                self._progress.epoch_began_ns = time.time_ns()
            self._part = part
            self._batch = {
                k: v.to(self.device, non_blocking=True) if isinstance(v, torch.Tensor) else v
                for k, v in part.batch.items()
            }
            yield self._batch

    def step(self, loss: torch.Tensor) -> float:
        """Make one optimiser step together with all ranks; return the global batch's mean loss.

        Args:
            loss: the *sum* of the losses of this rank's rows (``reduction="sum"``), a scalar.

        Raises:
            TrainingError: no batch under way, or a loss that is not a scalar tensor.
        """
        part = self._part
        if part is None:
            raise TrainingError("worker.step(loss) needs a batch from worker.batches() before it")
        if getattr(loss, "numel", lambda: 0)() != 1:
            raise TrainingError(
                "worker.step(loss) takes the summed loss of the batch, a scalar tensor: use "
                "reduction='sum' in the loss function"
            )
        loss.backward()
        mean = self._reduce(loss, part.delivered)
        for opt in self._optimisers():
            opt.step()
            opt.zero_grad(set_to_none=True)
        self._progress.step += 1
        self._part = None
        self._write_step(part, mean)
        if self._progress.step % self._plan.checkpoint_every == 0:
            self._checkpoint()
        return mean

    def log(self, **metrics: float) -> None:
        """Add figures to the next checkpoint's metrics (those of rank 0 are kept)."""
        self._metrics.update({k: float(v) for k, v in metrics.items()})

    def finish(self) -> None:
        """End the run: write the last checkpoint. The trainer calls it after the loop.

        Raises:
            TrainingError: the loop never made a step, or could not be saved.
        """
        if self._part is not None:
            raise TrainingError("the loop ended between a batch and its worker.step(loss)")
        if self._progress.step == 0:
            raise TrainingError(
                "the loop made no step: iterate over worker.batches() and call worker.step(loss)"
            )
        if self._saved is None or self._saved.step != self._progress.step:
            self._checkpoint()
        self._log.close()
        if self.rank == 0:
            done = {"step": self._progress.step, "cursor": self._shard.state_dict()}
            target = Path(self._plan.folder) / "done.json"
            target.with_suffix(".tmp").write_text(json.dumps(done))
            target.with_suffix(".tmp").replace(target)
        telemetry.flush()

    # -- beginning ------------------------------------------------------------------------------

    def _begin(self) -> None:
        root = Path(self._plan.folder)
        facts = torch.zeros(2, dtype=torch.int64, device=self.device)
        if self.rank == 0:
            checkpoints.prune(root / "checkpoints")
            newest = checkpoints.latest(root / "checkpoints")
            self._former = next(iter(reversed(attempts_of(root / "steps"))), None)
            facts[0] = self._former.number + 1 if self._former else 0
            facts[1] = newest.step if newest else 0
        self._collect(dist.broadcast, facts, 0)
        number, step = (int(x) for x in facts)
        if step:
            self._saved = checkpoints.load(root / "checkpoints" / f"step-{step:08d}.json")
            self._shard.load_state_dict(self._saved.cursor)
            self._progress.step = step
            self._progress.epoch = int(self._saved.cursor["epoch"])
            self._progress.epoch_began_ns = time.time_ns()
        self._announce(root, number, step)
        self._log = StepLog(root / "steps", number, self.rank)

    def _announce(self, root: Path, number: int, step: int) -> None:
        mine = (os.getpid(), socket.gethostname())
        everyone: list[Any] = [mine] * self.world_size
        if self.world_size > 1:
            self._collect(dist.all_gather_object, everyone, mine)
        if self.rank == 0:
            write_attempt(
                root / "steps",
                Attempt(
                    number=number,
                    session=self._plan.session,
                    step=step,
                    world_size=self.world_size,
                    pids=tuple(pid for pid, _ in everyone),
                    hosts=tuple(host for _, host in everyone),
                    time_ns=time.time_ns(),
                ),
            )

    def _restore(self) -> None:
        if self._saved is None:
            return
        state = checkpoints.restore(self._saved)
        if set(state) != set(self._attached):
            raise CheckpointError(
                f"checkpoint {self._saved.uri} holds {sorted(state)}, the loop attached "
                f"{sorted(self._attached)}: it is of another model; use another run name"
            )
        for name, thing in self._attached.items():
            try:
                thing.load_state_dict(state[name])
            except (RuntimeError, ValueError, KeyError) as e:
                raise CheckpointError(
                    f"checkpoint {self._saved.uri} does not fit {name!r}, so it is of another "
                    f"model; use another run name: {e}"
                ) from e

    def _broadcast(self) -> None:
        for net in self._nets().values():
            for tensor in net.state_dict().values():
                self._collect(dist.broadcast, tensor, 0)

    # -- a step ---------------------------------------------------------------------------------

    def _reduce(self, loss: torch.Tensor, rows: int) -> float:
        """Sum gradients and loss over ranks, divide by the rows of the global batch.

        Args:
            loss: summed over this rank's rows.
            rows: how many those are; a transform may have dropped some of the planned ones.
        """
        groups: dict[torch.dtype, list[torch.Tensor]] = {}
        count = torch.tensor(rows, dtype=torch.float32, device=loss.device)
        counted = torch.stack([loss.detach().to(torch.float32).reshape(()), count])
        groups[torch.float32] = [counted]
        for net in self._nets().values():
            for p in net.parameters():
                if p.requires_grad:
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                    groups.setdefault(p.grad.dtype, []).append(p.grad)
        divisor: torch.Tensor | None = None
        for gradients in groups.values():
            flat = torch.cat([g.reshape(-1) for g in gradients])
            self._collect(dist.all_reduce, flat)
            divisor = flat[1].clamp(min=1).clone() if divisor is None else divisor
            flat /= divisor
            at = 0
            for g in gradients:
                g.copy_(flat[at : at + g.numel()].view_as(g))
                at += g.numel()
        return float(counted[0])

    def _collect(self, collective: Any, *arguments: Any) -> None:
        if self.world_size == 1:
            return
        try:
            collective(*arguments)
        except RuntimeError as e:
            raise PeerLost(f"rank {self.rank} lost a peer: {e}") from e

    def _version_of_rank_0(self, version: int) -> int:
        """Settle on one table version for the next epoch."""
        found = torch.tensor([version], dtype=torch.int64, device=self.device)
        self._collect(dist.broadcast, found, 0)
        return int(found)

    def _write_step(self, part: Part | MixedPart, loss: float) -> None:
        digest = part.digest
        self._log.write(
            Step(
                step=self._progress.step,
                epoch=part.epoch,
                batch=part.step,
                rows=len(part.ids),
                loss=loss,
                high=digest.high,
                low=digest.low,
                time_ns=time.time_ns(),
                ids=cast("list[int]", part.ids.tolist()) if self._plan.audit else None,
            )
        )
        self._metrics["loss"] = loss
        self._record_recovery()

    def _record_recovery(self) -> None:
        """Once, after the first step of an attempt that followed a failure: how long it took."""
        former, self._former = self._former, None
        if former is None or former.session != self._plan.session:
            return
        made = steps_of(Path(self._plan.folder) / "steps", former.number)
        last = max(made, default=former.step)
        began = max((s.time_ns for s in made.get(last, [])), default=former.time_ns)
        telemetry.record(
            "lepton.train.failure",
            self._plan.carrier,
            began,
            error="WorkerLost",
            attributes={
                "lepton.step": last,
                "lepton.steps_replayed": last - (self.step_number - 1),
                "lepton.world_size": self.world_size,
            },
        )

    def _end_epoch(self) -> None:
        if self.rank == 0 and self._progress.epoch_began_ns:
            telemetry.record(
                "lepton.train.epoch",
                self._plan.carrier,
                self._progress.epoch_began_ns,
                attributes={
                    "lepton.epoch": self._progress.epoch,
                    "lepton.step": self._progress.step,
                    "lepton.world_size": self.world_size,
                },
            )
        self._progress.epoch_began_ns = 0

    # -- checkpoints ----------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        """Rank 0 writes; the state is equal everywhere."""
        if self.rank != 0:
            return
        root = Path(self._plan.folder)
        began = time.time_ns()
        cursor = self._shard.state_dict()
        followed = {} if cursor["version"] is None else {"table_version": cursor["version"]}
        signature, error = self._watcher.export(root / checkpoints.PROGRAM)
        with telemetry.span(
            "lepton.checkpoint", self._plan.carrier, attributes={"lepton.step": self.step_number}
        ) as span:
            self._saved = checkpoints.save(
                root / "checkpoints",
                step=self._progress.step,
                state={name: thing.state_dict() for name, thing in self._attached.items()},
                cursor=cursor,
                program=root / checkpoints.PROGRAM if signature else None,
                lineage={**self._plan.lineage, **followed},
                preparation=self._plan.preparation,
                signature=signature.to_dict() if signature else None,
                program_error=error,
                metrics=dict(self._metrics),
                traceparent=span.carrier.traceparent,
            )
            span.set(lepton_bytes=self._saved.size, lepton_prepare_ns=time.time_ns() - began)

    def _nets(self) -> dict[str, torch.nn.Module]:
        return {n: t for n, t in self._attached.items() if isinstance(t, torch.nn.Module)}

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        return [t for t in self._attached.values() if isinstance(t, torch.optim.Optimizer)]


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
