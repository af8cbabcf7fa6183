"""A run's evaluations, as one of its workers takes part in them.

Invariant: between two steps all ranks know the same evaluations. What is due next, and whether the
run is to stop, follows from them and from the step alone, so all ranks decide alike. When workers
come together anew they settle on the longest list that one of them has, and newcomers learn it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from lepton import telemetry
from lepton.errors import TrainingError
from lepton.stream import Part
from lepton.training import evaluations, sharding
from lepton.training.evaluations import Judged
from lepton.training.group import Group
from lepton.training.plan import Plan
from lepton.training.stopping import Standing
from lepton.training.tallies import METRICS, Classes, Tally, tally_of, total_of
from lepton.training.validation import Settled
from lepton.training.watcher import Watcher

Feed = tuple[str, list[tuple[str, str]]]
"""An attached net's name, and the columns that it takes with their data types."""

_TOLD = {m for names in METRICS.values() for m in names}
"""Figures that a span may have: a person's own are in the run's folder alone."""


class Examination:
    """Judges the attached nets, if the plan asks for that.

    Args:
        plan: of the run.
        group: the ranks.
        attached: name to whatever is attached.
        watcher: knows what feeds the net.
        device: where batches go.

    Attributes:
        history: the evaluations so far, by step; only the last has its confusion matrix.
    """

    def __init__(
        self,
        plan: Plan,
        group: Group,
        attached: Mapping[str, Any],
        watcher: Watcher,
        device: torch.device,
    ) -> None:
        self.history: list[Judged] = []
        self._plan = plan
        self._group = group
        self._attached = attached
        self._watcher = watcher
        self._device = device
        self._feed: Feed | None = None

    @property
    def _last(self) -> int:
        return self.history[-1].step if self.history else 0

    @property
    def standing(self) -> Standing | None:
        """How the run stands by its rule to stop, if it has one."""
        stop = self._plan.stop
        if stop is None:
            return None
        return stop.standing([(e.step, e.metrics.get(stop.metric, math.nan)) for e in self.history])

    @property
    def stops(self) -> bool:
        """Whether the run is to stop here."""
        standing = self.standing
        return standing is not None and standing.stop

    @property
    def verdict(self) -> dict[str, Any]:
        """Return what the end of a run says about an early one; nothing otherwise."""
        standing = self.standing
        if standing is None or self._plan.stop is None or not standing.stop:
            return {}
        return {"stopped": {**self._plan.stop.to_dict(), **standing.to_dict()}}

    def is_due(self, step: int) -> bool:
        """Return whether the net is to be judged as it is, so many steps having been made."""
        settled = self._plan.validation
        if settled is None or step <= self._last:
            return False
        return step % settled.validation.every == 0 or step == self._plan.steps

    def figures(self, step: int) -> dict[str, float]:
        """Return the figures of a step that was judged; none of another one."""
        return dict(self.history[-1].metrics) if self.history and self._last == step else {}

    def is_best(self, step: int) -> bool:
        """Return whether a step is the best so far by the rule to stop."""
        standing = self.standing
        return standing is not None and standing.best_step == step > 0

    def resume(self, step: int, signature: Mapping[str, Any] | None) -> None:
        """Take up where a checkpoint was written."""
        if self._plan.validation is None:
            return
        known = evaluations.read(Path(self._plan.folder)) if self._group.rank == 0 else []
        self.history = [e.brief() for e in known if e.step <= step]
        if signature is not None:
            columns = [(str(i["name"]), str(i["dtype"])) for i in signature["inputs"]]
            self._feed = (str(signature["net"]), columns)

    def settle(self) -> None:
        """Learn what one of the ranks knows; collective.

        Raises:
            PeerLost: a worker went away.
        """
        if self._plan.validation is None:
            return
        found = self._group.gather((self.history, self._feed or self._watcher.feed()))
        self.history = list(max((history for history, _ in found), key=len))
        self._feed = next((feed for _, feed in found if feed is not None), None)
        if self._group.rank == 0 and self.history:  # who took the last one may be gone
            written = {e.step for e in evaluations.read(Path(self._plan.folder))}
            if self._last not in written:
                self._write()

    def take(self, step: int, epoch: int) -> Judged:
        """Judge the nets and return what was found; collective.

        Raises:
            PeerLost: a worker went away; nothing has changed.
            TrainingError: the answers and the labels do not go together.
        """
        settled = self._plan.validation
        assert settled is not None  # noqa: S101 - it was due
        began = time.time_ns()
        with _still(self._attached, self._device):
            tallies, answers = self._answers(settled)
        parts: list[Any] = self._group.gather((tallies, answers))
        tallies = [t for found, _ in parts for t in found]
        given = {k: v for _, found in parts for k, v in found.items()}
        if not tallies:
            raise TrainingError(
                f"the stream's transform leaves no row of {settled.rows.snapshot} to validate on: "
                "give Validation(...) rows that it keeps"
            )
        tally = total_of(tallies)
        now = time.time_ns()
        self.history = [e.brief() for e in self.history]
        self.history.append(
            Judged(
                step=step,
                epoch=epoch,
                rows=tally.rows,
                metrics={**tally.metrics, **_measured(settled, given)},
                confusion=tally.confusion.tolist() if isinstance(tally, Classes) else None,
                seconds=(now - began) / 1e9,
                world_size=self._group.world_size,
                time_ns=now,
                table=str(settled.validation.snapshot),
            )
        )
        if self._group.rank == 0:
            self._write()
        return self.history[-1]

    def _write(self) -> None:
        judged = self.history[-1]
        evaluations.append(Path(self._plan.folder), judged)
        named = {f"lepton.{k}": v for k, v in judged.metrics.items() if k in _TOLD}
        telemetry.record(
            "lepton.evaluate",
            self._plan.carrier,
            judged.time_ns - int(judged.seconds * 1e9),
            judged.time_ns,
            attributes={
                "lepton.table": judged.table,
                "lepton.step": judged.step,
                "lepton.rows": judged.rows,
                "lepton.world_size": judged.world_size,
                **named,
            },
        )

    def _answers(self, settled: Settled) -> tuple[list[Tally], dict[tuple[int, int], Any]]:
        """Return what this rank's rows add up to, and, if they are wanted, the answers to them.

        Those are labels and scores by (batch, lane), which is the rows' order at any world size.
        """
        validation = settled.validation
        where = f"run {Path(self._plan.folder).name!r} on {validation.snapshot}"
        predict = validation.predict or self._through_the_net
        sharded = sharding.is_sharded(nets_of(self._attached))
        tallies: list[Tally] = []
        answers: dict[tuple[int, int], Any] = {}
        for part in _parts(settled, self._group):
            if not part.delivered and not sharded:
                continue
            batch = {
                k: v.to(self._device, non_blocking=True) if isinstance(v, torch.Tensor) else v
                for k, v in part.batch.items()
            }
            found = predict(self._attached, batch)
            if not part.delivered:  # it was asked as the other ranks need its parameters
                continue
            scores = _numbers(found, where)
            labels = part.batch[validation.label].numpy()
            tallies.append(tally_of(settled.task, scores, labels, where))
            begin = 0
            for lane, rows in part.lanes if validation.metrics else []:
                end = begin + rows
                answers[part.step, lane] = (labels[begin:end], scores[begin:end])
                begin = end
        return [total_of(tallies)] if tallies else [], answers

    def _through_the_net(self, attached: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
        feed = self._feed = self._feed or self._watcher.feed()
        if feed is None:
            raise TrainingError(
                "cannot tell how the validation rows go through the net: no single attached net "
                "takes columns as they come; pass Validation(predict=...), a function of the "
                "attached things by name and a batch that returns scores"
            )
        name, columns = feed
        return attached[name](*(batch[c].to(getattr(torch, kind)) for c, kind in columns))


def _parts(settled: Settled, group: Group) -> Generator[Part]:
    shard = settled.rows.shard(group.rank, group.world_size)
    try:
        while True:
            try:
                yield shard.next_part()
            except StopIteration:
                return
    finally:
        shard.close()


def _measured(settled: Settled, answers: Mapping[tuple[int, int], Any]) -> dict[str, float]:
    """Work the person's own figures out, over all rows in their order."""
    measures: Mapping[str, Callable[[Any, Any], float]] = settled.validation.metrics
    if not measures:
        return {}
    ordered = [answers[key] for key in sorted(answers)]
    labels, scores = (np.concatenate([pair[i] for pair in ordered]) for i in (0, 1))
    return {name: float(measure(labels, scores)) for name, measure in measures.items()}


def _numbers(scores: object, where: str) -> Any:
    """Return the first tensor of what a net gave, as 32- or 64-bit floats on the CPU."""
    found: object = scores
    while not isinstance(found, torch.Tensor):
        several = cast("Any", found)
        if not isinstance(found, Mapping | list | tuple) or not several:
            raise TrainingError(f"{where}: the net gives a {type(scores).__name__}, not a tensor")
        found = next(iter(several.values() if isinstance(found, Mapping) else several))
    wide = found if found.dtype == torch.float64 else found.float()
    return wide.detach().cpu().numpy()


@contextmanager
def _still(attached: Mapping[str, Any], device: torch.device) -> Generator[None]:
    """Put nets into evaluation mode; leave random numbers and modes as they were."""
    nets = nets_of(attached)
    sharded = sharding.is_sharded(nets)  # asked before they are called, which puts them together
    modes = [(module, module.training) for net in nets for module in net.modules()]
    devices = [device] if device.type == "cuda" else []
    try:
        for net in nets:
            net.eval()
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        if sharded:
            sharding.reshard(nets)


def nets_of(attached: Mapping[str, Any]) -> list[torch.nn.Module]:
    """Return the torch modules among what is attached."""
    return [t for t in attached.values() if isinstance(t, torch.nn.Module)]
