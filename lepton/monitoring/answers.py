"""Reading the inference log: counts, errors and latencies of a version since a moment."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lepton.errors import LakeError
from lepton.lake import Snapshot, home_of, table


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What a version did: requests, failed ones, and the 99th percentile of latency (ms)."""

    requests: int = 0
    errors: int = 0
    p99_ms: float = 0.0


def answers_of(model: str, home: str | None = None) -> Snapshot | None:
    """Return the inference log of a model, or None if nothing was answered yet."""
    try:
        return table(f"{home_of(home)}/answers/{model}")
    except LakeError:
        return None


def observed(model: str, version: int, since_us: int, home: str | None = None) -> Counts:
    """Count a version's answers since a Unix time in microseconds (one a request)."""
    log = answers_of(model, home)
    if log is None:
        return Counts()
    moment = datetime.fromtimestamp(since_us / 1e6, tz=UTC)
    wanted = (
        (pc.field("version") == version)
        & (pc.field("time") >= pa.scalar(moment, pa.timestamp("us", tz="UTC")))
        & (pc.field("row") == 0)
    )
    rows = log.select(["status", "latency_ms"]).where(wanted).to_arrow()
    if not len(rows):
        return Counts()
    status, latency = rows["status"].to_numpy(), rows["latency_ms"].to_numpy()
    return Counts(
        requests=len(rows),
        errors=int((status >= 500).sum()),
        p99_ms=float(np.quantile(latency, 0.99)),
    )


def count_answers(model: str, home: str | None = None, *, trace_id: str | None = None) -> int:
    """Return how many requests the inference log of a model holds; of one trace, or all."""
    log = answers_of(model, home)
    if log is None:
        return 0
    first = log.where(pc.field("row") == 0)
    return (
        first if trace_id is None else first.where(pc.field("trace_id") == trace_id)
    ).count_rows()
