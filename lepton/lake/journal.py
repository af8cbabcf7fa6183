"""Commits in lepton's own hand: what deltalake has no words for, such as change data.

A commit's file is made where there is none, in one step and whole (Delta protocol, "Delta Log
Entries"), or it is another's: a hard link on a file system, a conditional put on an object store.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from deltalake.exceptions import CommitFailedError, DeltaError

from lepton.errors import LakeError
from lepton.lake.connection import connection
from lepton.lake.files import Written
from lepton.lake.history import actions_of
from lepton.lake.log import DataFile
from lepton.lake.storage import opened_table
from lepton.lake.vectors import descriptor_of

_LOCKS = ("aws_s3_locking_provider", "s3_locking_provider")
_EVERY = 100  # commits to a checkpoint, where a table does not say


def publish(
    uri: str, number: int, actions: Iterable[Mapping[str, Any]], options: Mapping[str, str] | None
) -> None:
    """Make the commit of a number.

    Raises:
        CommitFailedError: it is there already.
        LakeError: the storage cannot make a file only where there is none.
        OSError: the storage does; the commit may be there all the same.
    """
    lines = (json.dumps(a, allow_nan=False, separators=(",", ":")) for a in actions)
    body = "".join(f"{line}\n" for line in lines).encode()
    name = f"{number:020}.json"
    if "://" in uri:
        _put(f"{uri}/_delta_log", name, body, options or {})
    else:
        _link(Path(uri, "_delta_log"), name, body)


def info_of(operation: str, more: Mapping[str, Any]) -> dict[str, Any]:
    """Return the action that says what a commit did, and who."""
    told = {"timestamp": _now(), "operation": operation, "operationParameters": {}}
    return {"commitInfo": {**told, "engineInfo": "lepton", **more}}


def stamp(uri: str, before: int, options: Mapping[str, str] | None) -> dict[str, Any]:
    """Return the time that a commit carries ("In-Commit Timestamps"), later than the former's."""
    times = [_now()]
    for action in actions_of(uri, before, options) or ():
        info: dict[str, Any] = action.get("commitInfo") or {}
        times.append(int(info.get("inCommitTimestamp") or 0) + 1)
    return {"inCommitTimestamp": max(times)}


def once(application: str, version: int) -> dict[str, Any]:
    """Return the action that keeps an application's version."""
    return {"txn": {"appId": application, "version": version, "lastUpdated": _now()}}


def named(file: Written, *, data_change: bool) -> dict[str, Any]:
    """Return the action that names a file which came."""
    told = {"path": file.path, "partitionValues": dict(file.partition), "size": file.size}
    if file.feed:
        return {"cdc": {**told, "dataChange": False}}
    more = {"modificationTime": file.modified_ms, "dataChange": data_change}
    return {"add": {**told, **more, "stats": file.statistics}}


def gone(file: DataFile, *, data_change: bool) -> dict[str, Any]:
    """Return the action that takes a file out; with the vector it has, or it would stay."""
    told: dict[str, Any] = {
        "path": file.spelled or file.path,
        "deletionTimestamp": _now(),
        "dataChange": data_change,
    }
    if file.vector is not None:
        told["deletionVector"] = descriptor_of(file.vector)
    return {"remove": told}


def _now() -> int:
    return int(time.time() * 1000)


def keep_short(uri: str, number: int, options: Mapping[str, str] | None) -> None:
    """Write the checkpoint that a commit of this number brings; without it nothing is lost."""
    with contextlib.suppress(DeltaError, OSError, ValueError):
        if number % 10:  # no table has them closer
            return
        opened = opened_table(uri, options)
        every = int(opened.metadata().configuration.get("delta.checkpointInterval") or _EVERY)
        if number % every == 0:
            opened.create_checkpoint()


def _link(folder: Path, name: str, body: bytes) -> None:
    written = folder / f".{uuid.uuid4()}.tmp"
    try:
        with written.open("xb") as sink:
            sink.write(body)
            sink.flush()
            os.fsync(sink.fileno())
        os.link(written, folder / name)
    except FileExistsError as e:
        raise CommitFailedError(f"{name} was written by another commit") from e
    finally:
        written.unlink(missing_ok=True)


def _put(folder: str, name: str, body: bytes, options: Mapping[str, str]) -> None:
    if any(k.lower() in _LOCKS for k in options):
        raise LakeError(
            f"{name} of {folder} needs a conditional put, and a locking provider is set: leave "
            "that out, or change the table with the engine that made it"
        )
    try:
        obstore: Any = import_module("obstore")
        errors: Any = import_module("obstore.exceptions")
    except ImportError as e:
        raise LakeError(
            f"to write {name} of {folder} lepton needs obstore: pip install 'lepton[s3]'"
        ) from e
    try:
        obstore.put(connection(folder, options), name, body, mode="create")
    except (errors.AlreadyExistsError, errors.PreconditionError) as e:
        raise CommitFailedError(f"{name} was written by another commit") from e
    except Exception as e:  # obstore has one class for each trouble
        raise OSError(f"cannot write {name} of {folder}: {e}") from e
