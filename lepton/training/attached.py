"""What a loop has given into lepton's care: nets, optimisers, and other things with a state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lepton.errors import TrainingError


class Attached(dict[str, Any]):
    """Things with a ``state_dict``, by the names that the loop gave them.

    A compiled net is kept as the net that it was made from: same weights, plain names.

    Raises:
        TrainingError: one of them has no state.
    """

    def __init__(self, objects: Mapping[str, Any] | None = None) -> None:
        given = objects or {}
        for name, thing in given.items():
            if not hasattr(thing, "state_dict") or not hasattr(thing, "load_state_dict"):
                raise TrainingError(
                    f"cannot attach {name!r}: a {type(thing).__name__} has no state_dict(); "
                    "attach torch modules, optimisers, schedulers or objects like them"
                )
        super().__init__({n: getattr(t, "_orig_mod", t) for n, t in given.items()})

    @property
    def nets(self) -> dict[str, torch.nn.Module]:
        """The torch modules."""
        return {n: t for n, t in self.items() if isinstance(t, torch.nn.Module)}

    @property
    def optimisers(self) -> list[torch.optim.Optimizer]:
        """The optimisers."""
        return [t for t in self.values() if isinstance(t, torch.optim.Optimizer)]

    def make_step(self, clip: float | None, update: Callable[[], None] | None) -> None:
        """Let the optimisers, or the loop's own function, use the gradients.

        Args:
            clip: largest norm of the gradients over all nets; None: unlimited.
            update: in place of every optimiser's ``step()``.
        """
        if clip is not None:
            parameters = [p for net in self.nets.values() for p in net.parameters()]
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        if update is not None:
            update()
        else:
            for opt in self.optimisers:
                opt.step()
