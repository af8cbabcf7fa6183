"""What changed between two versions, commit by commit, as a change data feed tells it.

A commit that wrote change files (Delta protocol, section "Change Data Files") is read from them.
Any other is worked out from the files that came or went, and from the rows that a file's deletion
vector took or gave back.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute

from lepton.errors import LakeError
from lepton.lake.fields import Field
from lepton.lake.history import actions_of
from lepton.lake.log import DataFile, Version, load_version
from lepton.lake.read import POSITION, deleted_of, stored_rows

if TYPE_CHECKING:
    from lepton.lake.snapshot import Snapshot

pc: Any = pyarrow.compute  # its stubs know no arrays of unknown type

KIND = "_change_type"
COMMIT = "_commit_version"


def changes_of(snapshot: Snapshot, since: int) -> pa.Table:
    """Return the snapshot's columns of every changed row after version ``since``."""
    version = snapshot.load()
    parts = [_tagged(snapshot.schema.empty_table(), "insert", 0)]
    for number in range(since + 1, snapshot.version + 1):
        actions = actions_of(snapshot.uri, number, dict(snapshot.options))
        if actions is None:
            raise LakeError(
                f"changes of {snapshot} since {since}: commit {number} is no longer in the log; "
                "ask for a later version"
            )
        feed = [a["cdc"] for a in actions if a.get("cdc")]
        if feed:
            parts += [_fed(snapshot, version, entry, number) for entry in feed]
        elif any(_changes_data(a) for a in actions):
            parts += _differences(snapshot, version, number)
    return pa.concat_tables(parts)


def _changes_data(action: dict[str, Any]) -> bool:
    of_file: dict[str, Any] = action.get("add") or action.get("remove") or {}
    return bool(of_file.get("dataChange"))


def _fed(snapshot: Snapshot, version: Version, entry: dict[str, Any], number: int) -> pa.Table:
    kind = Field(name=KIND, physical=KIND, id=None, type=pa.string())
    raw: dict[str, Any] = entry.get("partitionValues") or {}
    file = DataFile(
        path=unquote(str(entry["path"])),
        rows=None,
        partition={
            f.name: _typed(raw.get(f.physical), f.type)
            for f in version.fields
            if f.name in version.partition_columns
        },
    )
    wanted = (*snapshot.schema.names, KIND)
    rows = replace(snapshot, columns=wanted).read_part(
        replace(version, fields=(*version.fields, kind)), file
    )
    rows = rows.drop_columns(POSITION)
    return rows.append_column(COMMIT, pa.array([number] * len(rows), pa.int64()))


def _typed(text: str | None, kind: pa.DataType) -> Any:
    """A partition value as the log writes it (section "Partition Value Serialization")."""
    if text is None or text == "":
        return None
    value: Any = pa.array([text])
    if pa.types.is_timestamp(kind):
        value = value.cast(pa.timestamp("us", "UTC") if text.endswith("Z") else pa.timestamp("us"))
    return value.cast(kind)[0].as_py()


def _differences(snapshot: Snapshot, version: Version, number: int) -> list[pa.Table]:
    before = load_version(snapshot.uri, number - 1, snapshot.options)
    after = load_version(snapshot.uri, number, snapshot.options)
    options = dict(snapshot.options)
    old, new = ({f.path: f for f in side.files} for side in (before, after))
    parts: list[pa.Table] = []
    for kind, side, other in (("delete", before, new), ("insert", after, old)):
        for file in side.files:
            there = other.get(file.path)
            if there is not None and there.vector in (None, file.vector):
                continue  # no row less than before
            rows = snapshot.read_part(version, _renamed(file, side, version))
            if there is not None:
                count = stored_rows(side, there, options)
                gone = pa.array(deleted_of(side, there, count, options))
                rows = rows.filter(pc.is_in(rows[POSITION], gone))
            parts.append(_tagged(rows.drop_columns(POSITION), kind, number))
    return parts


def _renamed(file: DataFile, of: Version, to: Version) -> DataFile:
    """The file with its partition values under the names of another version of the schema."""
    physical = {f.name: f.physical for f in of.fields}
    now = {f.physical: f.name for f in to.fields}
    moved = {now[physical[c]]: v for c, v in file.partition.items() if physical[c] in now}
    return replace(file, partition=moved)


def _tagged(rows: pa.Table, kind: str, number: int) -> pa.Table:
    tagged = rows.append_column(KIND, pa.array([kind] * len(rows), pa.string()))
    return tagged.append_column(COMMIT, pa.array([number] * len(rows), pa.int64()))
