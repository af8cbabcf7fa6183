"""The Delta log as lepton sees it: a pinned version, its schema, and its data files in one order.

deltalake replays the log; this file checks that the table asks for nothing that lepton does not
implement (reader features are an allow-list: the protocol's section "Reader Version Requirements"
demands refusal of the rest) and puts the files into the order that row identities rest on: by
path.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from datetime import datetime
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from lepton.errors import LakeError
from lepton.lake.descriptors import descriptors
from lepton.lake.fields import POSITION, Field, fields_of
from lepton.lake.history import explain_damage, first_line, oldest_version, refuse_gaps
from lepton.lake.moments import version_at
from lepton.lake.storage import again, opened_table
from lepton.lake.vectors import Vector

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
        vector: its deletion vector, if it has one.
        modified_ms: when it was written, Unix milliseconds, as the log says.
        spelled: the path letter by letter as in the log, where that is another.
    """

    path: str
    rows: int | None
    partition: Mapping[str, Any] = dataclass_field(default_factory=dict[str, Any])
    vector: Vector | None = None
    modified_ms: int = 0
    spelled: str | None = None

    @property
    def live(self) -> int | None:
        """Rows that are not deleted, or None when the log does not say."""
        if self.rows is None:
            return None
        return self.rows - (self.vector.deleted if self.vector else 0)


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

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file, by path."""
        columns: Any = self.statistics
        if columns is None:
            return {}
        paths: list[str] = columns["path"].to_pylist()
        return dict(zip(paths, columns["size_bytes"].to_pylist(), strict=True))

    def without_files(self) -> Version:
        """Return what a task that has its files already needs: small, however large the table."""
        return replace(self, files=(), statistics=None)


def open_table(
    uri: str,
    version: int | datetime | None = None,
    storage_options: Mapping[str, str] | None = None,
) -> DeltaTable:
    """Open a table at a version (a number, a time, or the newest).

    A time without a zone is in UTC.

    Raises:
        TypeError: the version is no number and no time.
        LakeError: no table there, no such version, or a log that cannot be replayed.
    """
    given: Any = version
    if isinstance(given, bool) or not isinstance(given, int | datetime | None):
        raise TypeError(f"version= takes a number or a datetime, not {given!r}")
    if "://" not in uri and re.search("%[0-9A-Fa-f]{2}", uri):
        raise LakeError(
            f"the path {uri!r} has a percent escape in a folder's name, which deltalake takes for "
            "another folder's; rename it (inside the table such names are fine)"
        )
    options = dict(storage_options) if storage_options else None
    try:
        opened = opened_table(uri, options)
    except TableNotFoundError as e:
        raise LakeError(
            f"no Delta table at {uri!r}: check the path, or write one with lepton.write(data, uri)"
        ) from e
    except (DeltaError, OSError, ValueError) as e:
        raise damaged(uri, options, e) from e
    newest = opened.version()
    if isinstance(version, datetime):
        version = version_at(uri, version, newest, opened.metadata().configuration, options)
    if version is None or version == newest:
        return opened
    if not 0 <= version <= newest:
        raise LakeError(f"table {uri!r} has no version {version}: versions 0 to {newest} exist")
    try:
        again(partial(opened.load_as_version, version))
    except (DeltaError, OSError, ValueError) as e:
        first = oldest_version(uri, options)
        if first is not None and version < first:
            raise LakeError(
                f"table {uri!r} has no version {version} any more: its log begins at version "
                f"{first}, what came before was cleaned up; ask for a later one"
            ) from e
        said = first_line(e)
        raise LakeError(f"cannot load {uri!r}@{version} (newest: {newest}): {said}") from e
    return opened


def damaged(uri: str, options: Mapping[str, str] | None, error: Exception) -> LakeError:
    """Return the error that says why a log cannot be replayed, and which file to look at."""
    told = explain_damage(uri, options)
    return LakeError(f"cannot open the Delta table at {uri!r}: {first_line(error)}; {told}")


@lru_cache(maxsize=32)
def load_version(uri: str, number: int, options: tuple[tuple[str, str], ...]) -> Version:
    """Replay the log of one pinned version, once per process.

    Raises:
        LakeError: the table needs a reader feature that lepton does not have.
    """
    return again(lambda: _loaded(uri, number, options))


def _loaded(uri: str, number: int, options: tuple[tuple[str, str], ...]) -> Version:
    refuse_gaps(uri, number, dict(options))
    opened = open_table(uri, number, dict(options))
    _check_features(opened, uri, number)
    metadata = opened.metadata()
    what = f"{uri!r}@{number}"
    asked = opened.protocol().reader_features or []
    asks = "deletionVectors" in asked or "://" not in uri  # where reading the log twice is quick
    masked = asks or _masked(opened)
    vectors = descriptors(uri, number, dict(options)) if masked else {}
    files, statistics = _files(opened, vectors, what)
    mode = str(metadata.configuration.get("delta.columnMapping.mode", "none"))
    return Version(
        uri=uri,
        number=number,
        fields=_fields(opened, mode, what),
        partition_columns=tuple(metadata.partition_columns),
        files=files,
        table_id=str(metadata.id),
        widened=any("typeWidening" in f for f in asked),
        statistics=statistics,
    )


def _masked(opened: DeltaTable) -> bool:
    """Whether some file has a deletion vector all the same, as a careless writer may leave it."""
    try:
        found = pa.RecordBatchReader.from_stream(opened.deletion_vectors())
        return any(len(batch) for batch in found)
    except (DeltaError, OSError, ValueError):
        return True  # for all that is known


def _fields(opened: DeltaTable, mode: str, what: str) -> tuple[Field, ...]:
    try:
        fields = fields_of(opened.schema().to_json(), mode)
    except LakeError as e:
        raise LakeError(f"table {what}: {e}; rewrite the table without that column") from e
    if any(f.name == POSITION for f in fields):
        raise LakeError(
            f"table {what} has a column {POSITION}, a name that lepton needs for itself; rename it"
        )
    return fields


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


def _files(
    opened: DeltaTable, vectors: Mapping[str, Vector | None], what: str
) -> tuple[tuple[DataFile, ...], pa.Table]:
    actions = pa.RecordBatchReader.from_stream(opened.get_add_actions()).read_all()
    encoded: Any = actions["path"].to_pylist()
    decoded = [unquote(p) if "%" in p else p for p in encoded]
    spelled = {d: e for d, e in zip(decoded, encoded, strict=True) if d != e}
    paths = pa.array(decoded, pa.string())
    actions = actions.set_column(actions.column_names.index("path"), "path", paths)
    actions = actions.sort_by("path")
    names = set(actions.column_names)
    counts = actions["num_records"].to_pylist() if "num_records" in names else None
    try:
        parts = actions["partition"].to_pylist() if "partition" in names else None
    except (OverflowError, ValueError) as e:
        raise LakeError(
            f"table {what} has a partition value that Python has no name for: {e}; read a version "
            "or a copy without it"
        ) from e
    times: Any = actions["modification_time"].to_pylist()
    files: list[DataFile] = []
    ordered: Any = actions["path"].to_pylist()
    _refuse_doubles(ordered, what)
    for i, path in enumerate(ordered):
        files.append(
            DataFile(
                path=path,
                rows=counts[i] if counts else None,
                partition=_values(parts[i]) if parts else {},
                vector=vectors.get(path),
                modified_ms=int(times[i]),
                spelled=spelled.get(path),
            )
        )
    kept = [c for c in _STATISTICS if c in names]
    return tuple(files), actions.select(kept)


def _refuse_doubles(ordered: list[str], what: str) -> None:
    twice = next((a for a, b in pairwise(ordered) if a == b), None)
    if twice is not None:
        raise LakeError(
            f"table {what} lists {twice!r} twice, so its rows "
            "would be read twice: a writer changed its deletion vector without removing the old "
            "one; read an older version"
        )


_STATISTICS = ("path", "size_bytes", "num_records", "null_count", "min", "max")


def _values(partition: Mapping[str, Any] | None) -> dict[str, Any]:
    """Partition values; the protocol writes null as the empty string, for every type."""
    return {k: None if v == "" else v for k, v in (partition or {}).items()}
