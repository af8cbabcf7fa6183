"""Events as rows of the registry's table, for anybody's Delta reader. Pure.

Columns: ``model`` string, ``seq`` int64, ``time`` timestamp, ``kind`` string, ``version`` int64,
``share`` double, ``actor`` string, ``trace_id`` string, ``reason`` string, ``checkpoint`` string,
``payload`` string (JSON: lineage, metrics, signature, tags, gate results, details of a trial, of a
description or of a measurement, the event's random id). docs/registry.md says it all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

import pyarrow as pa

from lepton.registry.events import Event, ModelVersion

SCHEMA = pa.schema(
    [
        pa.field("model", pa.string(), nullable=False),
        pa.field("seq", pa.int64(), nullable=False),
        pa.field("time", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("version", pa.int64()),
        pa.field("share", pa.float64()),
        pa.field("actor", pa.string()),
        pa.field("trace_id", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("checkpoint", pa.string()),
        pa.field("payload", pa.string()),
    ]
)


def row_of(event: Event) -> dict[str, Any]:
    """Return an event as a row of :data:`SCHEMA`."""
    entry = event.registered
    payload: dict[str, Any] = {"id": event.id, "gate": list(event.gate)}
    if event.details:
        payload["details"] = dict(event.details)
    if entry is not None:
        payload["version"] = {**asdict(entry), "created": entry.created.isoformat()}
    return {
        "model": event.model,
        "seq": event.seq,
        "time": event.time,
        "kind": event.kind,
        "version": event.version,
        "share": event.share,
        "actor": event.actor,
        "trace_id": entry.trace_id if entry else event.trace_id,
        "reason": event.reason,
        "checkpoint": entry.checkpoint if entry else None,
        "payload": json.dumps(payload, allow_nan=False),
    }


def event_of(row: Mapping[str, Any]) -> Event:
    """Read it back."""
    payload: dict[str, Any] = json.loads(row["payload"])
    stored: dict[str, Any] | None = payload.get("version")
    entry: ModelVersion | None = None
    if stored is not None:
        created = datetime.fromisoformat(stored.pop("created"))
        entry = ModelVersion(**stored, created=created)
    return Event(
        model=row["model"],
        seq=row["seq"],
        time=row["time"],
        kind=row["kind"],
        version=row["version"],
        share=row["share"],
        reason=row["reason"] or "",
        gate=tuple(payload["gate"]),
        registered=entry,
        details=payload.get("details", {}),
        actor=row["actor"] or "",
        trace_id=row["trace_id"] or "",
        id=payload.get("id", ""),
    )
