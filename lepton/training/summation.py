"""From a loss on every rank to the mean gradient on every rank: at once, or lane by lane."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lepton.errors import TrainingError
from lepton.stream import Part
from lepton.stream.mixture import MixedPart
from lepton.training.exact import Closure, LaneSums, refuse_statistics
from lepton.training.gradients import Gradients, Summed
from lepton.training.group import Group
from lepton.training.plan import Plan


class Summation:
    """Makes the gradients of all attached nets means over the global batch.

    Args:
        plan: of the run.
        nets: by name.
        group: the ranks.

    Attributes:
        local: summed loss of this rank's rows, of the last batch.

    Raises:
        TrainingError: a net cannot be trained exactly, which the plan asks for.
    """

    def __init__(self, plan: Plan, nets: Mapping[str, torch.nn.Module], group: Group) -> None:
        self.local = torch.zeros(())
        self._exact = plan.exact
        self._group = group
        self._gradients = Gradients(nets.values())
        self._lanes = LaneSums(self._gradients, plan.lanes, plan.seed)
        if plan.exact:
            refuse_statistics(nets)
            torch.use_deterministic_algorithms(True)
            torch.set_num_threads(1)  # as many everywhere: sums inside an operation depend on it

    def make(
        self,
        loss: torch.Tensor | Closure,
        part: Part | MixedPart,
        batch: Mapping[str, Any],
        step: int,
    ) -> Summed:
        """Back-propagate and sum over ranks; collective.

        Args:
            loss: summed over this rank's rows, or a function that returns it.
            part: whose rows these are.
            batch: the rows.
            step: steps made before this one.

        Raises:
            TrainingError: not a scalar loss, or not a function where one is needed.
            PeerLost: a worker went away; the gradients are spoiled.
        """
        if self._exact:
            return self._exactly(loss, part, batch, step)
        total = _scalar(loss if isinstance(loss, torch.Tensor) else loss(batch))
        self.local = total.detach()
        divided = 1.0
        if total.requires_grad:  # dividing here saves a pass over all gradients
            divided = float(part.global_rows)
            (total / divided).backward()
        return self._gradients.reduce(total, part.delivered, self._group, divided=divided)

    def _exactly(
        self,
        closure: torch.Tensor | Closure,
        part: Part | MixedPart,
        batch: Mapping[str, Any],
        step: int,
    ) -> Summed:
        if not callable(closure) or isinstance(part, MixedPart):
            raise TrainingError(
                "with exact=True worker.step takes a function of a batch that returns its summed "
                "loss, such as worker.step(lambda rows: loss_of(net, rows)): it is called for each "
                "lane's rows"
            )

        def checked(rows: Mapping[str, Any]) -> torch.Tensor:
            return _scalar(closure(rows))

        self.local = self._lanes.compute(checked, part, batch, step)
        return self._lanes.reduce(self._group)

    def end(self) -> Summed:
        """Take part in a step that this rank no longer makes; collective."""
        if self._exact:
            return self._lanes.reduce(self._group, ended=True)
        none = torch.zeros((), device=self.local.device)
        return self._gradients.reduce(none, 0, self._group, ended=True)

    def clear(self) -> None:
        """Forget every gradient."""
        self._gradients.clear(alone=self._group.world_size == 1)


def _scalar(loss: Any) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise TrainingError(
            "worker.step(loss) takes the summed loss of the batch, a scalar tensor: use "
            "reduction='sum' in the loss function"
        )
    return loss
