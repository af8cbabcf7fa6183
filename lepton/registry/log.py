"""The event log's table: one commit an event, compare-and-set by application transaction.

Columns: ``model`` string, ``seq`` int64, ``time`` timestamp, ``kind`` string, ``version`` int64,
``share`` double, ``actor`` string, ``trace_id`` string, ``reason`` string, ``checkpoint`` string,
``payload`` string (JSON: lineage, metrics, signature, tags, gate results). Event n of a model
carries the Delta transaction (``lepton-registry/<model>``, n): two writers of the same n conflict
in the log itself, so that one of them loses.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from lepton.errors import ConflictError, RegistryError
from lepton.registry.events import (
    Event,
    ModelState,
    ModelVersion,
    apply,
    check_metrics,
    check_name,
    state_of,
)

SCHEMA = pa.schema(
    [
        pa.field("model", pa.string(), nullable=False),
        pa.field("seq", pa.int64(), nullable=False),
        pa.field("time", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        ("version", pa.int64()),
        ("share", pa.float64()),
        ("actor", pa.string()),
        ("trace_id", pa.string()),
        ("reason", pa.string()),
        ("checkpoint", pa.string()),
        ("payload", pa.string()),
    ]
)
RETRIES = 50


class Registry:
    """Model versions and pointers, kept in the Delta table at ``uri`` (made when first written).

    Safe to use from several threads; cheap to poll: only commits that are new are read.
    """

    def __init__(
        self, uri: str | os.PathLike[str], storage_options: Mapping[str, str] | None = None
    ) -> None:
        self.uri = os.fspath(uri)
        self._options = dict(storage_options) if storage_options else None
        self._table: DeltaTable | None = None
        self._events: dict[str, list[Event]] = {}
        self._states: dict[str, ModelState] = {}
        self._files: set[str] = set()
        self._folded = -1
        self._lock = threading.RLock()

    # -- reading --------------------------------------------------------------------------------

    def models(self) -> list[str]:
        """Return the names of all models."""
        with self._lock:
            self._refresh()
            return sorted(self._events)

    def state(self, model: str) -> ModelState:
        """Return a model's newest state; empty for a name never registered."""
        check_name(model)
        with self._lock:
            self._refresh()
            return self._states.get(model, ModelState(model=model))

    def version(self, model: str, which: int | str) -> ModelVersion:
        """Return a version by number, or by alias: champion, previous, canary.

        Raises:
            RegistryError: there is none; the message says which there are.
        """
        state = self.state(model)
        if not state.versions:
            raise RegistryError(f"no model {model!r} in {self.uri}; it has: {self.models()}")
        number: Any = which
        if isinstance(which, str):
            if which not in ("champion", "previous", "canary"):
                raise RegistryError(f"{which!r} is not champion, previous or canary")
            number = getattr(state.pointer, which)
        if number not in state.versions:
            raise RegistryError(
                f"model {model!r} has no version {which!r}; it has: {sorted(state.versions)}"
            )
        return state.versions[number]

    def history(self, model: str) -> list[Event]:
        """Return a model's events, oldest first."""
        self.state(model)
        return list(self._events.get(model, []))

    def at(self, model: str, time: datetime) -> ModelState:
        """Return the state as it was at a time (with a time zone)."""
        return state_of(model, [e for e in self.history(model) if e.time <= time])

    # -- writing --------------------------------------------------------------------------------

    def register(
        self,
        model: str,
        *,
        checkpoint: str,
        manifest_sha256: str,
        metrics: Mapping[str, float] | None = None,
        trace_id: str = "",
        **described: Any,
    ) -> ModelVersion:
        """Record the next version of a model, whatever number that is by then.

        Args:
            described: lineage, signature, size and tags of :class:`ModelVersion`.
        """
        check_name(model)
        figures = check_metrics(metrics or {})
        for _ in range(RETRIES):
            state = self.state(model)
            entry = ModelVersion(
                model=model,
                version=max(state.versions, default=0) + 1,
                checkpoint=checkpoint,
                manifest_sha256=manifest_sha256,
                metrics=figures,
                parent=state.pointer.champion,
                created=_now(),
                actor=_actor(),
                trace_id=trace_id,
                **described,
            )
            try:
                self._commit(state, "registered", version=entry.version, registered=entry)
            except ConflictError:
                continue
            return entry
        raise ConflictError(f"could not register a version of {model!r}: too many writers at once")

    def start_canary(
        self, model: str, version: int, share: float, *, expect: int | None, gate: Sequence[Any] = ()
    ) -> ModelState:
        """Give a version a share of requests beside the champion.

        Args:
            expect: the pointer's ``seq`` that the caller saw; None acts on the newest.
            gate: results of the gates that it passed.

        Raises:
            ConflictError: the model has moved on since ``expect``.
            RegistryError: not possible in this state.
        """
        return self._move(model, expect, "canary", version=version, share=share, gate=_plain(gate))

    def promote(
        self, model: str, version: int, *, expect: int | None, gate: Sequence[Any] = ()
    ) -> ModelState:
        """Make a version the champion; raises as :meth:`start_canary`."""
        return self._move(model, expect, "promoted", version=version, gate=_plain(gate))

    def abort_canary(self, model: str, *, expect: int | None, reason: str) -> ModelState:
        """Take the canary's share away; raises as :meth:`start_canary`."""
        return self._move(model, expect, "aborted", reason=reason)

    def rollback(self, model: str, *, expect: int | None, reason: str) -> ModelState:
        """Make the former champion the champion; raises as :meth:`start_canary`."""
        return self._move(model, expect, "rolled_back", reason=reason)

    def _move(self, model: str, expect: int | None, kind: str, **fields: Any) -> ModelState:
        for _ in range(RETRIES):
            state = self.state(model)
            if expect is not None and state.pointer.seq != expect:
                raise ConflictError(
                    f"model {model!r} moved to event {state.pointer.seq} since event {expect} was "
                    "read: look at its state and decide again"
                )
            try:
                return self._commit(state, kind, **fields)
            except ConflictError:
                if expect is not None:
                    raise
        raise ConflictError(f"could not move {model!r}: too many writers at once")

    def _commit(self, state: ModelState, kind: str, **fields: Any) -> ModelState:
        event = Event(
            model=state.model,
            seq=state.pointer.seq + 1,
            time=_now(),
            kind=kind,
            actor=_actor(),
            **fields,
        )
        after = apply(state, event)  # refuses what is not possible, before anything is written
        transaction = Transaction(f"lepton-registry/{event.model}", event.seq)
        with self._lock:
            try:
                write_deltalake(
                    self._table if self._table is not None else self.uri,
                    pa.Table.from_pylist([_row(event)], schema=SCHEMA),
                    mode="append" if self._table is not None else "error",
                    storage_options=self._options,
                    commit_properties=CommitProperties(
                        app_transactions=[transaction], max_commit_retries=0
                    ),
                )
            except (CommitFailedError, DeltaError, OSError) as e:
                self._table = None
                self._refresh()
                if self._states.get(event.model, ModelState(model="")).pointer.seq >= event.seq:
                    raise ConflictError(f"somebody else moved {event.model!r} first") from e
                if isinstance(e, CommitFailedError) or "already exists" in str(e):
                    raise ConflictError(f"the registry {self.uri} was busy") from e
                raise RegistryError(f"cannot write to the registry {self.uri}: {e}") from e
        return after

    def _refresh(self) -> None:
        """Fold in what was committed since the last look."""
        try:
            if self._table is None:
                self._table = DeltaTable(self.uri, storage_options=self._options)
            else:
                self._table.update_incremental()
        except TableNotFoundError:
            return
        except (DeltaError, OSError) as e:
            raise RegistryError(f"cannot read the registry {self.uri}: {e}") from e
        if self._table.version() != self._folded:
            self._fold(self._table)

    def _fold(self, opened: DeltaTable) -> None:
        files = set(opened.file_uris())
        if self._files - files:  # somebody compacted the table: read it anew
            self._files, self._events, self._states = set(), {}, {}
        fresh = sorted(files - self._files)
        rows: list[dict[str, Any]] = []
        for uri in fresh:
            rows += self._read(uri)
        for row in sorted(rows, key=lambda r: (r["model"], r["seq"])):
            event = _event(row)
            state = self._states.get(event.model, ModelState(model=event.model))
            self._states[event.model] = apply(state, event)
            self._events.setdefault(event.model, []).append(event)
        self._files |= set(fresh)
        self._folded = opened.version()

    def _read(self, uri: str) -> list[dict[str, Any]]:
        if "://" not in uri:
            return pq.ParquetFile(Path(uri)).read().to_pylist()
        from deltalake.fs import DeltaStorageHandler
        from pyarrow.fs import PyFileSystem

        inside = uri.removeprefix(self.uri.rstrip("/") + "/")
        handler = PyFileSystem(DeltaStorageHandler(self.uri, self._options))
        with handler.open_input_file(inside) as source:
            return pq.ParquetFile(source).read().to_pylist()


def _row(event: Event) -> dict[str, Any]:
    entry = event.registered
    payload: dict[str, Any] = {"gate": list(event.gate)}
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


def _event(row: Mapping[str, Any]) -> Event:
    payload = json.loads(row["payload"])
    entry = payload.get("version")
    if entry is not None:
        entry = ModelVersion(**{**entry, "created": datetime.fromisoformat(entry["created"])})
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
        actor=row["actor"] or "",
        trace_id=row["trace_id"] or "",
    )


def _plain(gate: Sequence[Any]) -> tuple[dict[str, Any], ...]:
    return tuple(g if isinstance(g, dict) else asdict(g) for g in gate)


def _now() -> datetime:
    return datetime.now(UTC)


def _actor() -> str:
    return f"{getpass.getuser()}@{socket.gethostname()}"


