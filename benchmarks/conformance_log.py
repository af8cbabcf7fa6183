"""Delta tables written action by action, as the protocol's text says, with no library for Delta.

So a table can hold what a library for Delta would not write: physical names, widened columns,
deletion vectors, odd statistics, features that nobody has.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

Action = dict[str, Any]
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
_MAGIC = 1681511377
_NO_RUNS = 12346


class Log:
    """The log of one table, version by version."""

    def __init__(self, root: Path) -> None:
        """Make the folder; nothing is committed yet."""
        self.root = root
        self.version = -1
        (root / "_delta_log").mkdir(parents=True)

    def commit(self, *actions: Action) -> None:
        """Write the next version."""
        self.version += 1
        info = {"commitInfo": {"timestamp": 1_700_000_000_000 + self.version, "operation": "TEST"}}
        lines = [json.dumps(a) for a in (info, *actions)]
        path = self.root / "_delta_log" / f"{self.version:020}.json"
        path.write_text("\n".join(lines) + "\n")

    def add(
        self,
        name: str,
        rows: pa.Table,
        partition: Mapping[str, str | None] | None = None,
        *,
        stats: Mapping[str, Any] | None = None,
        path: str | None = None,
        **parquet: Any,
    ) -> Action:
        """Write a data file and return the action that adds it.

        Args:
            name: the file's own name.
            rows: what it stores, under physical names.
            partition: partition values by physical name, as text.
            stats: statistics to claim besides the number of rows; None claims nothing.
            path: what the log calls it, if not by its encoded name.
            parquet: options of the Parquet writer.
        """
        file = self.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, file, **parquet)
        known = None if stats is None else json.dumps({"numRecords": len(rows), **stats})
        return {
            "add": {
                "path": quote(name, safe="/=") if path is None else path,
                "partitionValues": dict(partition or {}),
                "size": file.stat().st_size,
                "modificationTime": 1_700_000_000_000,
                "dataChange": True,
            }
            | ({} if known is None else {"stats": known})
        }


def protocol(features: Sequence[str] = (), *, reader: int = 3, writer: int = 7) -> Action:
    """Return a protocol action: reader and writer features, or two plain version numbers."""
    body: dict[str, Any] = {"minReaderVersion": reader, "minWriterVersion": writer}
    if reader >= 3:
        body["readerFeatures"] = list(features)
    if writer >= 7:
        body["writerFeatures"] = list(features)
    return {"protocol": body}


def metadata(
    columns: Sequence[Action], partition: Sequence[str] = (), **configuration: str
) -> Action:
    """Return a metaData action; configuration keys have ``_`` for ``.``, without ``delta.``."""
    return {
        "metaData": {
            "id": "00000000-0000-4000-8000-000000000001",
            "format": {"provider": "parquet", "options": {}},
            "schemaString": json.dumps({"type": "struct", "fields": list(columns)}),
            "partitionColumns": list(partition),
            "configuration": {f"delta.{k.replace('_', '.')}": v for k, v in configuration.items()},
            "createdTime": 1_700_000_000_000,
        }
    }


def column(name: str, kind: Any, physical: str | None = None, number: int | None = None) -> Action:
    """Return a column of a schema, with its physical name and id where columns are mapped."""
    meta: dict[str, Any] = {}
    if physical is not None:
        meta = {"delta.columnMapping.physicalName": physical, "delta.columnMapping.id": number}
    return {"name": name, "type": kind, "nullable": True, "metadata": meta}


def widened(name: str, before: str, after: str) -> Action:
    """Return a column whose type was widened."""
    change = [{"fromType": before, "toType": after}]
    return column(name, after) | {"metadata": {"delta.typeChanges": change}}


def struct_of(*members: Action) -> Action:
    """Return a struct type."""
    return {"type": "struct", "fields": list(members)}


def array_of(element: Any) -> Action:
    """Return an array type."""
    return {"type": "array", "elementType": element, "containsNull": True}


def map_of(key: Any, value: Any) -> Action:
    """Return a map type."""
    return {"type": "map", "keyType": key, "valueType": value, "valueContainsNull": True}


def numbered(name: str, kind: pa.DataType, number: int) -> pa.Field[Any]:
    """Return an Arrow field that is written with a Parquet field id."""
    return pa.field(name, kind, metadata={"PARQUET:field_id": str(number)})


def without(action: Action, deleted: Sequence[int]) -> Action:
    """Return an add action with an inline deletion vector of some stored rows, ascending."""
    values = struct.pack(f"<{len(deleted)}H", *deleted)
    bitmap = struct.pack("<IIHHI", _NO_RUNS, 1, 0, len(deleted) - 1, 16) + values
    whole = struct.pack("<iqi", _MAGIC, 1, 0) + bitmap
    padded = whole + bytes(-len(whole) % 4)
    vector = {
        "storageType": "i",
        "pathOrInlineDv": z85(padded),
        "sizeInBytes": len(whole),
        "cardinality": len(deleted),
    }
    return {"add": action["add"] | {"deletionVector": vector}}


def removed(action: Action) -> Action:
    """Return the action that removes what an add action added."""
    body = {k: v for k, v in action["add"].items() if k in ("path", "deletionVector")}
    return {"remove": body | {"dataChange": True, "deletionTimestamp": 1_700_000_000_000}}


def z85(data: bytes) -> str:
    """Write in ZeroMQ's base 85 (rfc.zeromq.org/spec/32): four bytes are five digits."""
    plain = base64.b85encode(data).decode()
    ours = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~"
    return plain.translate(str.maketrans(ours, _DIGITS))
