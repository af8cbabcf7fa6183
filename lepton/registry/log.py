"""The event log's table: one commit an event, compare-and-set by application transaction.

Event n of a model carries the Delta transaction (``lepton-registry/<model>``, n): two writers of
the same n conflict in the log itself, so that one of them loses.

Delta compares a transaction only with commits newer than the writer's table handle. So a decision
and its commit hold the lock: nothing moves the handle past the state that was decided on. A
commit that makes a table has no handle to compare with, so the table is made empty first.

Each event is a file, and each promotion opens a log anew: who is to write to a table of many files
puts them together first, and makes a checkpoint of Delta's own log.
"""

from __future__ import annotations

import getpass
import logging
import os
import secrets
import socket
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.fs import DeltaStorageHandler
from pyarrow.fs import PyFileSystem

from lepton.errors import ConflictError, LakeError, RegistryError
from lepton.lake.compaction import commit_anew
from lepton.lake.log import load_version
from lepton.lake.rules import rules_of
from lepton.registry.events import (
    ROLES,
    Event,
    ModelState,
    ModelVersion,
    apply,
    check_name,
    state_of,
    undoes,
)
from lepton.registry.rows import SCHEMA, event_of, row_of

RETRIES = 50
MOST_FILES = 32

log = logging.getLogger("lepton")


class EventLog:
    """Every model's events and states, in the Delta table at ``uri`` (made when first written).

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
        """Return a version by number, by role (champion, previous, canary, shadow) or by alias.

        Raises:
            RegistryError: there is none; the message says which there are.
        """
        state = self.state(model)
        if not state.versions:
            raise RegistryError(f"no model {model!r} in {self.uri}; it has: {self.models()}")
        number: Any = which
        if isinstance(which, str):
            if which not in (*ROLES, *state.aliases):
                known = [*ROLES, *sorted(state.aliases)]
                raise RegistryError(f"{which!r} is none of model {model!r}'s: {', '.join(known)}")
            number = getattr(state.pointer, which) if which in ROLES else state.aliases[which]
        if number not in state.versions:
            raise RegistryError(
                f"model {model!r} has no version {which!r}; it has: {sorted(state.versions)}"
            )
        return state.versions[number]

    def history(self, model: str) -> list[Event]:
        """Return a model's events, oldest first."""
        check_name(model)
        with self._lock:
            self._refresh()
            return list(self._events.get(model, []))

    def at(self, model: str, time: datetime) -> ModelState:
        """Return the state as it was at a time.

        Raises:
            ValueError: the time has no time zone.
        """
        if time.tzinfo is None:
            raise ValueError(f"time {time} has no time zone: say datetime(..., tzinfo=UTC)")
        return state_of(model, takewhile(lambda e: e.time <= time, self.history(model)))

    def _move(
        self, model: str, expect: int | None, kind: str, *, traceparent: str = "", **fields: Any
    ) -> ModelState:
        if traceparent:
            fields["details"] = {**fields.get("details", {}), "traceparent": traceparent}
        for _ in range(RETRIES):
            with self._lock:
                state = self.state(model)
                if expect is not None:
                    self._check(state, expect, kind, fields.get("details", {}))
                after = self._commit(state, kind, **fields)
                if after is not None:
                    return after
        raise ConflictError(f"could not move {model!r}: too many writers at once")

    def _check(self, state: ModelState, expect: int, kind: str, details: Mapping[str, Any]) -> None:
        """Refuse a move that was decided on what is no longer so. Needs the lock."""
        seq = state.pointer.seq
        since = self._events.get(state.model, [])[max(expect, 0) :]
        alias = str(details.get("alias", ""))
        undone = next((e for e in since if undoes(e, kind, alias)), None)
        if undone is not None or expect > seq:
            what = f": event {undone.seq} ({undone.kind}) came since" if undone else ""
            raise ConflictError(
                f"model {state.model!r} is at event {seq}, not at event {expect} that was read"
                f"{what}; look at its state and decide again"
            )

    def _commit(self, state: ModelState, kind: str, **fields: Any) -> ModelState | None:
        """Commit the event after ``state``; None to look again. Needs the lock."""
        if self._table is not None and len(self._files) >= MOST_FILES:
            self._put_together(self._table)
        former = self._events.get(state.model, [])
        event = Event(
            model=state.model,
            seq=state.pointer.seq + 1,
            # clocks of machines differ; a model's time never runs backwards
            time=max([now(), *(e.time for e in former[-1:])]),
            kind=kind,
            actor=actor(),
            id=secrets.token_hex(8),
            **fields,
        )
        after = apply(state, event)  # refuses what is not possible, before anything is written
        if self._table is None:
            self._make()
            return None
        try:
            self._write(self._table, event)
        except (DeltaError, OSError) as e:
            self._table = None
            self._refresh()
            if any(e.id == event.id for e in self._events.get(event.model, [])):
                return after  # what failed came after the commit, such as Delta's own checkpoint
            if isinstance(e, CommitFailedError):
                return None
            raise RegistryError(f"cannot write to the registry {self.uri}: {e}") from e
        return after

    def _make(self) -> None:
        """Make the table, unless another process does."""
        once = CommitProperties(max_commit_retries=0)
        try:
            DeltaTable.create(
                self.uri, SCHEMA, storage_options=self._options, commit_properties=once
            )
        except (DeltaError, OSError) as e:
            if not DeltaTable.is_deltatable(self.uri, self._options):
                raise RegistryError(f"cannot make the registry {self.uri}: {e}") from e

    def _put_together(self, opened: DeltaTable) -> None:
        """Have one file hold the events that the handle sees, for whoever opens the log next.

        Not where another commit comes first, so the handle does not pass the state decided on.
        """
        options = tuple(sorted((self._options or {}).items()))
        try:
            version = load_version(self.uri, opened.version(), options)
            rules = rules_of(opened, self.uri, same_rows=True)
            if commit_anew(opened, rules, version, [version.files], options=self._options):
                opened.create_checkpoint()
        except (LakeError, DeltaError, OSError, ValueError) as e:  # whoever writes next tries again
            log.warning("the registry %s stays in many files, slow to open: %s", self.uri, e)

    def _write(self, opened: DeltaTable, event: Event) -> None:
        transaction = Transaction(f"lepton-registry/{event.model}", event.seq)
        write_deltalake(
            opened,
            pa.Table.from_pylist([row_of(event)], schema=SCHEMA),
            mode="append",
            commit_properties=CommitProperties(app_transactions=[transaction]),
        )

    def _refresh(self) -> None:
        """Fold in what was committed since the last look."""
        try:
            if self._table is None:
                self._table = DeltaTable(self.uri, storage_options=self._options)
            else:
                self._table.update_incremental()
            if self._table.version() != self._folded:
                self._fold(self._table)
        except TableNotFoundError:
            return
        except (DeltaError, OSError, ValueError, KeyError) as e:
            raise RegistryError(f"cannot read the registry {self.uri}: {e!r}") from e

    def _fold(self, opened: DeltaTable) -> None:
        files = set(opened.file_uris())
        kept = self._files <= files  # if not, somebody compacted the table: read it anew
        rows = [r for f in files - (self._files if kept else set()) for r in self._read(f)]
        states = dict(self._states) if kept else {}
        fresh: dict[str, list[Event]] = {}
        for row in sorted(rows, key=lambda r: (r["model"], r["seq"])):
            event = event_of(row)
            states[event.model] = apply(
                states.get(event.model, ModelState(model=event.model)), event
            )
            fresh.setdefault(event.model, []).append(event)
        former = self._events if kept else {}
        # nothing above changed the registry: a file that cannot be read is tried again next time
        self._events = {**former, **{m: [*former.get(m, []), *new] for m, new in fresh.items()}}
        self._states, self._files, self._folded = states, files, opened.version()

    def _read(self, uri: str) -> list[dict[str, Any]]:
        if "://" not in uri:
            return pq.ParquetFile(Path(uri)).read().to_pylist()
        inside = uri.removeprefix(self.uri.rstrip("/") + "/")
        files = PyFileSystem(cast("Any", DeltaStorageHandler)(self.uri, self._options))
        with files.open_input_file(inside) as source:
            return pq.ParquetFile(source).read().to_pylist()


def now() -> datetime:
    """Return the time, in UTC."""
    return datetime.now(UTC)


def actor() -> str:
    """Return who does this: user@host."""
    return f"{getpass.getuser()}@{socket.gethostname()}"
