"""When a run has learnt what it can: a rule over its evaluations. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Standing:
    """How a run stands by its rule.

    Attributes:
        best: the best figure; not a number without any.
        best_step: the step that had it; 0 without any.
        waited: evaluations since then.
        stop: whether the run is to end.
    """

    best: float
    best_step: int
    waited: int
    stop: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited}


@dataclass(frozen=True, slots=True)
class EarlyStopping:
    """End a run when a figure of its evaluations no longer gets better.

    The best one's checkpoint is kept: it is :attr:`lepton.Run.best`.

    Attributes:
        metric: a figure of the evaluation, such as ``"accuracy"`` or ``"mse"``.
        mode: whether ``"max"`` or ``"min"`` is better.
        patience: evaluations without a better one after which the run ends.
        min_delta: by how much a figure must be better to count, in its own unit.

    Raises:
        ValueError: an option that cannot be.
    """

    metric: str
    _: KW_ONLY
    mode: Literal["max", "min"] = "max"
    patience: int = 3
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in ("max", "min"):
            raise ValueError(f"mode must be 'max' or 'min', not {self.mode!r}")
        if type(self.patience) is not int or self.patience < 1:
            raise ValueError(f"patience must be a whole number from 1 on, not {self.patience!r}")
        if not (math.isfinite(self.min_delta) and self.min_delta >= 0):
            raise ValueError(f"min_delta must be a number from 0 on, not {self.min_delta!r}")

    def standing(self, figures: Sequence[tuple[int, float]]) -> Standing:
        """Judge a run by its evaluations so far.

        Args:
            figures: (step, the metric), in order. What is not a number is never better.
        """
        sign = 1.0 if self.mode == "max" else -1.0
        best, best_step, waited = math.nan, 0, 0
        for step, figure in figures:
            better = math.isnan(best) or sign * (figure - best) > self.min_delta
            if better and not math.isnan(figure):
                best, best_step, waited = figure, step, 0
            else:
                waited += 1
        return Standing(best, best_step, waited, waited >= self.patience)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)
