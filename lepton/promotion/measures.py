"""What a gate may ask of a version that nobody has measured yet: how quick and how large it is.

``p50_ms`` and ``p99_ms`` are of one row through preparation and net, in this process on one thread;
``size_mb`` is of the checkpoint's files. They are measured when a gate names them, and no metric of
that name was registered.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from math import prod
from typing import Any

import numpy as np
import pyarrow as pa

from lepton import checkpoints
from lepton.export.restore import Predictor
from lepton.registry import ModelVersion
from lepton.serving.inputs import ARROW, checked, input_of

MEASURED = frozenset({"p50_ms", "p99_ms", "size_mb"})
WARM_RUNS = 20
RUNS = 300
MOST_S = 3.0


def measured(entry: ModelVersion, names: Iterable[str]) -> dict[str, float]:
    """Measure those of the names that can be measured and that the version does not have.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
    """
    asked = (MEASURED & set(names)) - entry.metrics.keys()
    found: dict[str, float] = {}
    if "size_mb" in asked:
        found["size_mb"] = entry.size / 1e6
    if asked - {"size_mb"}:
        times = latencies_ms(entry)
        for name, share in (("p50_ms", 50), ("p99_ms", 99)):
            if name in asked:
                found[name] = float(np.percentile(times, share))
    return found


def latencies_ms(entry: ModelVersion) -> list[float]:
    """Return how long single rows took, in milliseconds; some unmeasured ones came before."""
    import torch

    predictor = Predictor(checkpoints.load(entry.checkpoint))
    row = _row(predictor)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(WARM_RUNS):
            predictor(row)
        times: list[float] = []
        end = time.perf_counter() + MOST_S
        while len(times) < RUNS and (not times or time.perf_counter() < end):
            began = time.perf_counter()
            predictor(row)
            times.append((time.perf_counter() - began) * 1e3)
        return times
    finally:
        torch.set_num_threads(threads)


def _row(predictor: Predictor) -> pa.Table:
    """A row of zeros or empty texts, as it comes out of a request."""
    types = predictor.manifest.lineage.get("types", {})
    columns: dict[str, Any] = {}
    for spec in predictor.signature.inputs:
        taken = input_of(spec.name, types.get(spec.name, spec.dtype), spec.shape)
        kind = ARROW[taken.datatype]
        zero: Any = "" if pa.types.is_string(kind) else 0
        flat: Any = pa.array([zero] * prod(taken.shape)).cast(kind)
        columns[spec.name] = checked(flat, taken)
    return pa.table(columns)
