"""Several runs that belong together: what was asked for, so that asking again goes on with them.

<home>/studies/<name>.json      what was asked for, and the span that all of it is under
<home>/runs/<name>-.../         the runs
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lepton import telemetry
from lepton.errors import TrainingError
from lepton.lake import home_of
from lepton.telemetry import Carrier
from lepton.training import evaluations
from lepton.training.evaluations import Judged
from lepton.training.run import Run
from lepton.training.stopping import EarlyStopping


@contextmanager
def study(
    span: str, name: str, asked: Mapping[str, Any], home: str | None, trace: Carrier | None
) -> Generator[Carrier]:
    """Run a block under the study's span; a study that is taken up again stays in its trace.

    Args:
        span: its name.
        name: of the study.
        asked: plain JSON values that must be the same each time.
        home: where studies and runs are.
        trace: the span to run under, the first time.

    Raises:
        TrainingError: the name belongs to a study that something else was asked of.
    """
    path = Path(home_of(home)) / "studies" / f"{name}.json"
    parent = trace or Carrier("", str(path.parent.parent / "traces"))
    asked = {"span": span, **asked}
    if path.is_file():
        before: dict[str, Any] = json.loads(path.read_text())
        then: dict[str, Any] = before["asked"]
        differ = [k for k in sorted({*asked, *then}) if asked.get(k) != then.get(k)]
        if differ:
            raise TrainingError(
                f"study {name!r} was begun with "
                + ", ".join(f"{k}={then.get(k)!r}" for k in differ)
                + ": go on with the same, or choose another name"
            )
        parent = Carrier(before["traceparent"], parent.directory, parent.baggage)
    attributes = {"lepton.study": name, "lepton.table": asked["table"]}
    with telemetry.span(span, parent, attributes=attributes) as under:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            body = {"v": 1, "asked": asked, "traceparent": under.carrier.traceparent}
            path.with_suffix(".tmp").write_text(json.dumps(body, indent=1))
            path.with_suffix(".tmp").replace(path)
        yield under.carrier


def judged_of(run: Run, stop: EarlyStopping | None) -> Judged:
    """Return the evaluation that a run is known by: its best with a rule to stop, else its last.

    Raises:
        TrainingError: it has none.
    """
    found = evaluations.read(Path(run.folder))
    if not found:
        raise TrainingError(f"run {run.name!r} has no evaluation: train it with validate=")
    if stop is None:
        return found[-1]
    best = stop.standing([(e.step, e.metrics.get(stop.metric, math.nan)) for e in found])
    return next((e for e in found if e.step == best.best_step), found[-1])


def spread_of(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample deviation (0 for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
