"""The Delta log as lepton sees it: a pinned version, its schema, and its data files in one order.

deltalake replays the log; this file checks that the table asks for nothing that lepton does not
implement (reader features are an allow-list: the protocol's section "Reader Version Requirements"
demands refusal of the rest) and puts the files into the order that row identities rest on: by
path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from lepton.errors import LakeError
from lepton.lake.fields import Field, fields_of
from lepton.lake.history import explain_damage, refuse_gaps

READER_FEATURES = frozenset(
    {
        "columnMapping",
        "deletionVectors",
        "timestampNtz",
        "typeWidening",
        "typeWidening-preview",
        "v2Checkpoint",
        "vacuumProtocolCheck",
    }
)


@dataclass(frozen=True, slots=True)
class DataFile:
    """One data file of a version.

    Attributes:
        path: relative to the table, or absolute; decoded.
        rows: stored rows, or None when the log does not say.
        partition: logical column name to typed value.
        keep: packed bits, one per stored row, 0 for rows deleted by a deletion vector.
        modified_ms: when it was written, Unix milliseconds, as the log says.
    """

    path: str
    rows: int | None
    partition: Mapping[str, Any] = dataclass_field(default_factory=dict[str, Any])
    keep: bytes | None = None
    modified_ms: int = 0

    def kept(self, rows: int) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        """Return a boolean per stored row (a short vector keeps the rest), or None for all."""
        if self.keep is None:
            return None
        bits = np.unpackbits(np.frombuffer(self.keep, np.uint8), bitorder="little").astype(bool)
        return np.concatenate([bits[:rows], np.ones(max(0, rows - len(bits)), bool)])


@dataclass(frozen=True, slots=True)
class Version:
    """A table at one version: everything that a reader needs, picklable, without the log.

    Attributes:
        files: by path.
        widened: column types may have been narrower once.
        statistics: one row a file, in the order of ``files``: what the log says of it
            (``path size_bytes num_records null_count min max``; keyed by physical names).
    """

    uri: str
    number: int
    fields: tuple[Field, ...]
    partition_columns: tuple[str, ...]
    files: tuple[DataFile, ...]
    table_id: str
    widened: bool = False
    statistics: pa.Table | None = dataclass_field(default=None, repr=False, compare=False)

    @property
    def schema(self) -> pa.Schema:
        """The logical Arrow schema, partition columns included."""
        return pa.schema([f.arrow() for f in self.fields])

    def without_files(self) -> Version:
        """Return what a task that has its files already needs: small, however large the table."""
        return replace(self, files=(), statistics=None)


def open_table(
    uri: str,
    version: int | datetime | None = None,
    storage_options: Mapping[str, str] | None = None,
) -> DeltaTable:
    """Open a table at a version (a number, a time, or the newest).

    Raises:
        LakeError: no table there, no such version, or a log that cannot be replayed.
    """
    if "://" not in uri and re.search("%[0-9A-Fa-f]{2}", uri):
        raise LakeError(
            f"the path {uri!r} has a percent escape in a folder's name, which deltalake takes for "
            "another folder's; rename it (inside the table such names are fine)"
        )
    options = dict(storage_options) if storage_options else None
    try:
        opened = DeltaTable(uri, storage_options=options)
    except TableNotFoundError as e:
        raise LakeError(
            f"no Delta table at {uri!r}: check the path, or write one with lepton.write(data, uri)"
        ) from e
    except (DeltaError, OSError, ValueError) as e:
        told = explain_damage(uri, options)
        raise LakeError(f"cannot open the Delta table at {uri!r}: {e}; {told}") from e
    newest = opened.version()
    if version is None or version == newest:
        return opened
    if isinstance(version, int) and not 0 <= version <= newest:
        raise LakeError(f"table {uri!r} has no version {version}: versions 0 to {newest} exist")
    try:
        opened.load_as_version(version)
    except (DeltaError, OSError, ValueError) as e:
        raise LakeError(f"cannot load {uri!r} at version {version} (newest: {newest}): {e}") from e
    return opened


@lru_cache(maxsize=32)
def load_version(uri: str, number: int, options: tuple[tuple[str, str], ...]) -> Version:
    """Replay the log of one pinned version, once per process.

    Raises:
        LakeError: the table needs a reader feature that lepton does not have.
    """
    refuse_gaps(uri, number, dict(options))
    opened = open_table(uri, number, dict(options))
    _check_features(opened, uri, number)
    metadata = opened.metadata()
    files, statistics = _files(opened, uri)
    mode = str(metadata.configuration.get("delta.columnMapping.mode", "none"))
    return Version(
        uri=uri,
        number=number,
        fields=_fields(opened, mode, f"{uri!r}@{number}"),
        partition_columns=tuple(metadata.partition_columns),
        files=files,
        table_id=str(metadata.id),
        widened=any("typeWidening" in f for f in opened.protocol().reader_features or []),
        statistics=statistics,
    )


def _fields(opened: DeltaTable, mode: str, what: str) -> tuple[Field, ...]:
    try:
        return fields_of(opened.schema().to_json(), mode)
    except LakeError as e:
        raise LakeError(f"table {what}: {e}; rewrite the table without that column") from e


def _check_features(opened: DeltaTable, uri: str, number: int) -> None:
    protocol = opened.protocol()
    asked = set(protocol.reader_features or [])
    unknown = sorted(asked - READER_FEATURES)
    if unknown or protocol.min_reader_version > 3:
        what = ", ".join(unknown) or f"reader version {protocol.min_reader_version}"
        raise LakeError(
            f"table {uri!r}@{number} needs {what}, which lepton cannot read; rewrite the table "
            "without it (for example with Spark: ALTER TABLE ... DROP FEATURE) or read an older "
            "version"
        )


def _files(opened: DeltaTable, uri: str) -> tuple[tuple[DataFile, ...], pa.Table]:
    actions = pa.RecordBatchReader.from_stream(opened.get_add_actions()).read_all()
    encoded: Any = actions["path"].to_pylist()
    paths = pa.array([unquote(p) if "%" in p else p for p in encoded], pa.string())
    actions = actions.set_column(actions.column_names.index("path"), "path", paths)
    actions = actions.sort_by("path")
    names = set(actions.column_names)
    counts = actions["num_records"].to_pylist() if "num_records" in names else None
    parts = actions["partition"].to_pylist() if "partition" in names else None
    times: Any = actions["modification_time"].to_pylist()
    keeps = _deletions(opened)
    root = uri if "://" in uri else os.path.realpath(uri)  # as deltalake names deleted rows' files
    files: list[DataFile] = []
    ordered: Any = actions["path"].to_pylist()
    for i, path in enumerate(ordered):
        files.append(
            DataFile(
                path=path,
                rows=counts[i] if counts else None,
                partition=_values(parts[i]) if parts else {},
                keep=keeps.pop(path_of(root, path), None) if keeps else None,
                modified_ms=int(times[i]),
            )
        )
    if keeps:
        raise LakeError(
            f"table {uri!r} has deletion vectors for files that its log does not list: "
            f"{list(keeps)[:3]}"
        )
    kept = [c for c in _STATISTICS if c in names]
    return tuple(files), actions.select(kept)


_STATISTICS = ("path", "size_bytes", "num_records", "null_count", "min", "max")


def _values(partition: Mapping[str, Any] | None) -> dict[str, Any]:
    """Partition values; the protocol writes null as the empty string, for every type."""
    return {k: None if v == "" else v for k, v in (partition or {}).items()}


def _deletions(opened: DeltaTable) -> dict[str, bytes]:
    """Keep-masks by full path; asked for only where the feature is on, as it reads every one."""
    if "deletionVectors" not in (opened.protocol().reader_features or []):
        return {}
    masks: dict[str, bytes] = {}
    try:
        vectors_of = pa.RecordBatchReader.from_stream(opened.deletion_vectors())
    except (DeltaError, OSError, ValueError) as e:
        raise LakeError(
            f"cannot read the deletion vectors of {opened.table_uri!r}@{opened.version()}: {e}; "
            "restore the files deletion_vector_*.bin from a copy, or the table to an older version"
        ) from e
    for batch in vectors_of:
        paths: Any = batch.column("filepath").to_pylist()
        vectors: Any = batch.column("selection_vector")
        for path, mask in zip(paths, vectors, strict=True):
            bits = np.asarray(mask.values, dtype=bool)
            whole = np.concatenate([bits, np.ones(-len(bits) % 8, bool)])
            packed = np.packbits(whole, bitorder="little").tobytes()
            masks[unquote(path).removeprefix("file://")] = packed
    return masks


def path_of(uri: str, path: str) -> str:
    """Return the full path of a data file, given as the log does: relative or absolute."""
    if path.startswith("file:"):
        return "/" + path.removeprefix("file:").lstrip("/")
    if "://" in path or Path(path).is_absolute():
        return path
    return f"{uri.rstrip('/')}/{path}"
