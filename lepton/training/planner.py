"""``lepton.plan``: a forecast from the step logs of runs, and how far off it was afterwards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from lepton.cluster import bounds_of
from lepton.errors import TrainingError
from lepton.training.forecast import Forecast, Measured, Pace, fit, forecast, seconds_of
from lepton.training.run import Run, load_run, run_folder
from lepton.training.steps import Step

NAME = "forecast.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A forecast held against what happened.

    Attributes:
        predicted: seconds, for the rows and the workers that there were in the end.
        actual: seconds.
    """

    predicted: float
    actual: float

    @property
    def off(self) -> float:
        """How much longer it took, as a share: 0.1 is 10 % longer, -0.1 is 10 % shorter."""
        return self.actual / self.predicted - 1

    def to_dict(self) -> dict[str, float]:
        """Return plain JSON values, ``off`` among them."""
        return {"predicted": self.predicted, "actual": self.actual, "off": self.off}

    def __str__(self) -> str:
        longer = "longer" if self.off >= 0 else "shorter"
        return (
            f"took {self.actual:.1f} s, {self.predicted:.1f} s were predicted "
            f"({abs(self.off):.1%} {longer})"
        )


def plan(
    run: str | Run | Sequence[str | Run],
    *,
    workers: int | tuple[int, int],
    rows: int,
    deadline: str | float | None = None,
    price: float | None = None,
    write_to: str | None = None,
    home: str | None = None,
) -> Forecast:
    """Forecast time and cost of a run like others, by the number of workers.

    Args:
        run: what is measured: a run or its name; several ones, at other numbers of workers, tell
            how it scales. An elastic run has several by itself.
        workers: (fewest, most), or one number.
        rows: to train on, over all epochs.
        deadline: seconds, or a time span such as ``"2h"`` or ``"1h30m"``.
        price: of one worker (its GPU) for an hour.
        write_to: name of the run that it is for: when that has ended it says how far off it was,
            and :func:`outcome_of` tells.
        home: where runs are kept.

    Raises:
        ValueError: arguments that cannot be.
        TrainingError: no such run, or it made too few steps to be measured.
    """
    named: list[str | Run] = [run] if isinstance(run, str | Run) else list(run)
    runs = [load_run(r, home) if isinstance(r, str) else r for r in named]
    found = forecast(
        pace_of(runs),
        rows,
        bounds_of("workers", workers),
        deadline=None if deadline is None else seconds_of(deadline),
        price=price,
    )
    if write_to is not None:
        path = run_folder(write_to, home) / NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        told = {"v": 1, "rows": rows, "from": [r.name for r in runs], "pace": found.pace.to_dict()}
        path.with_suffix(".tmp").write_text(json.dumps(told, indent=1))
        path.with_suffix(".tmp").replace(path)
    return found


def pace_of(runs: Sequence[Run]) -> Pace:
    """Return how fast runs were; the time until the first step is the longest of theirs.

    Raises:
        TrainingError: they made too few steps.
    """
    starts = [start for start in (_start_of(r) for r in runs) if start is not None]
    try:
        return fit([m for r in runs for m in measured_in(r)], max(starts, default=0.0))
    except ValueError as e:
        names = ", ".join(repr(r.name) for r in runs)
        raise TrainingError(f"run {names} cannot be measured: {e}; let it make more steps") from e


def measured_in(run: Run) -> list[Measured]:
    """Return what each generation of a run's workers did, from its first step to its last."""
    found: list[Measured] = []
    for attempt, steps in run.attempts:
        made = [steps[n] for n in sorted(steps)]
        if len(made) > 1:
            found.append(
                Measured(
                    workers=attempt.world_size,
                    rows=sum(_rows(step) for step in made[1:]),
                    seconds=_time(made[-1]) - _time(made[0]),
                )
            )
    return found


def outcome_of(run: Run) -> Outcome | None:
    """Return how far a run's forecast was off; None if nobody made one, or no step was made."""
    path = Path(run.folder) / NAME
    if not path.is_file():
        return None
    pace = Pace.from_dict(json.loads(path.read_text())["pace"])
    lives = [(a, [steps[n] for n in sorted(steps)]) for a, steps in run.attempts if steps]
    if not lives:
        return None
    predicted = pace.start + sum(
        _rows(step) * pace.row_s(a.world_size) for a, made in lives for step in made
    )
    actual = (_start_of(run) or 0.0) + _time(lives[-1][1][-1]) - _time(lives[0][1][0])
    for (a, before), (b, after) in pairwise(lives):
        if a.session != b.session:  # nobody trained in between
            actual -= _time(after[0]) - _time(before[-1])
    return Outcome(predicted=predicted, actual=actual)


def _start_of(run: Run) -> float | None:
    """Seconds from the newest call of train() until its first step; None if it made none."""
    path = Path(run.folder) / "run.json"
    if not path.is_file():
        return None
    called = float(json.loads(path.read_text())["time"])
    firsts = [_time(steps[min(steps)]) for _, steps in run.attempts if steps]
    later = [first for first in firsts if first >= called]
    return min(later) - called if later else None


def _rows(step: Sequence[Step]) -> int:
    return sum(part.rows for part in step)


def _time(step: Sequence[Step]) -> float:
    """When a step was made, Unix seconds."""
    return min(part.time_ns for part in step if part.time_ns) / 1e9
