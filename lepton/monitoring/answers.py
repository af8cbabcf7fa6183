"""Reading the inference log: counts, errors and latencies of a version since a moment."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake.exceptions import TableNotFoundError

from lepton import telemetry
from lepton.errors import LakeError
from lepton.lake import Snapshot, home_of, table
from lepton.monitoring.drift import disagreement, drift

TIME_OVER = 504
"""Status of a request whose time, that of its client or else the server's, was over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What a version did.

    Attributes:
        requests: that it answered or failed.
        errors: of these, failed ones.
        p99_ms: the 99th percentile of their latency.
        given_up: further requests whose client had no more time for them; nobody's failure.
    """

    requests: int = 0
    errors: int = 0
    p99_ms: float = 0.0
    given_up: int = 0


def answers_of(model: str, home: str | None = None) -> Snapshot | None:
    """Return the inference log of a model, or None if nothing was answered yet.

    Raises:
        LakeError: there is one, but it cannot be read.
    """
    try:
        return table(f"{home_of(home)}/answers/{model}")
    except LakeError as e:
        if isinstance(e.__cause__, TableNotFoundError):
            return None
        raise


def observed(
    model: str, version: int, since_us: int, home: str | None = None, *, patient_ms: float = 0.0
) -> Counts:
    """Count a version's answers since a Unix time in microseconds (one a request).

    Args:
        model: its name.
        version: its number.
        since_us: the time.
        home: where the log is.
        patient_ms: what a client has to bear: if its time was over earlier, it gave up.

    Raises:
        LakeError: the log cannot be read.
    """
    log = answers_of(model, home)
    if log is None:
        return Counts()
    wanted = _since(version, since_us) & (pc.field("row") == 0)
    rows = log.select(["status", "latency_ms"]).where(wanted).to_arrow()
    status, latency = rows["status"].to_numpy(), rows["latency_ms"].to_numpy()
    counted = (status != TIME_OVER) | (latency >= patient_ms)
    given_up = len(rows) - int(counted.sum())
    if not counted.any():
        return Counts(given_up=given_up)
    return Counts(
        requests=int(counted.sum()),
        errors=int((status[counted] >= 500).sum()),
        p99_ms=float(np.quantile(latency[counted], 0.99)),
        given_up=given_up,
    )


def differences(
    model: str, versions: tuple[int, int], since_us: int, home: str | None = None
) -> tuple[float, float]:
    """Compare two versions' answers since a Unix time in microseconds.

    Returns:
        How far their distributions are apart (see :func:`lepton.monitoring.drift.drift`); and the
        share of rows they answer differently, of those that both were asked.
    """
    log = answers_of(model, home)
    if log is None:
        return 0.0, 0.0
    named = [c for c in log.schema.names if c.startswith("answer_")]
    if not named:
        return 0.0, 0.0
    kept = log.select(["request_id", "row", named[0]])
    ok = pc.field("status") == 200
    one, other = (kept.where(_since(v, since_us) & ok).to_arrow() for v in versions)
    values = [_values(t[named[0]]) for t in (one, other)]
    keys = [_places(t) for t in (one, other)]
    both = [k for k in keys[0] if k in keys[1]]
    paired = [v[[at[k] for k in both]] for v, at in zip(values, keys, strict=True)]
    apart = drift(*values), disagreement(*paired)
    labels = {"lepton.model": model, "lepton.version": versions[0]}
    for name, value in zip(("lepton.drift", "lepton.disagreement"), apart, strict=True):
        telemetry.measure(name, value, labels)
    return apart


def _places(rows: pa.Table) -> dict[Any, int]:
    """Where each row of each request is."""
    keys = zip(rows["request_id"].to_pylist(), rows["row"].to_pylist(), strict=True)
    return {key: at for at, key in enumerate(keys)}


def _values(column: Any) -> np.ndarray[Any, Any]:
    found: Any = column.combine_chunks()
    if pa.types.is_list(found.type):
        flat = found.flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(found), -1) if len(found) else np.zeros((0, 1))
    return found.to_numpy(zero_copy_only=False)


def _since(version: int, since_us: int) -> Any:
    moment: Any = pa.scalar(
        datetime.fromtimestamp(since_us / 1e6, tz=UTC), pa.timestamp("us", tz="UTC")
    )
    return (pc.field("version") == version) & (pc.field("time") >= moment)


def count_answers(model: str, home: str | None = None, *, trace_id: str | None = None) -> int:
    """Return how many requests the inference log of a model holds; of one trace, or all."""
    log = answers_of(model, home)
    if log is None:
        return 0
    first = log.where((pc.field("row") == 0) & (pc.field("variant") != "shadow"))
    return (
        first if trace_id is None else first.where(pc.field("trace_id") == trace_id)
    ).count_rows()
