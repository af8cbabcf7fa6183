"""How a table's schema may grow for rows that do not fit it, on request only.

Pure. A column may be added, NULL in every row that is there already; a type may become a wider one
of the protocol's list (section "Type Widening"), in which every value stays the same value. That
list needs a table feature: where a table does not have it, a type becomes wider only where all
files are written anew.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal, cast

import pyarrow as pa

from lepton.errors import LakeError
from lepton.lake.kinds import storable

Evolve = Literal["add", "widen", "rewrite"]

LAST_ID = "delta.columnMapping.maxColumnId"
_ID = "delta.columnMapping.id"
_INTEGERS = (pa.int8(), pa.int16(), pa.int32(), pa.int64())
_DIGITS = {pa.int8(): 10, pa.int16(): 10, pa.int32(): 10, pa.int64(): 20}


@dataclass(frozen=True, kw_only=True, slots=True)
class Evolution:
    """What becomes of a schema.

    Attributes:
        schema: the table's, as it will be.
        added: columns that are new, at its end.
        widened: new types by column.
    """

    schema: pa.Schema
    added: tuple[Any, ...] = ()
    widened: Mapping[str, pa.DataType] = field(default_factory=dict[str, pa.DataType])


def evolution(
    schema: pa.Schema,
    given: pa.Schema,
    how: Evolve | None,
    *,
    partition_columns: Sequence[str] = (),
    anew: bool = False,
) -> Evolution:
    """Return what the schema must become for rows of another.

    Args:
        schema: the table's.
        given: the rows'.
        how: ``add`` columns, or ``widen`` types as well (``rewrite``: in files that are there,
            too); None changes nothing.
        partition_columns: the table's; they keep their types.
        anew: types may change: every file is written anew, or the table lets files stay.

    Raises:
        LakeError: a type cannot be stored, or would have to change in files that stay.
    """
    if how is None:
        return Evolution(schema=schema)
    added = _added(schema, given)
    widened = _widened(schema, given, partition_columns) if how != "add" else {}
    if widened and not anew:
        named = ", ".join(
            f"{name} ({schema.field(name).type} to {kind})" for name, kind in widened.items()
        )
        raise LakeError(
            f"column {named} cannot become wider in files that stay: that needs the table property "
            "delta.enableTypeWidening, which deltalake cannot set; set it with Spark and write "
            "again, or have every file of the table written anew with evolve='rewrite'"
        )
    fields = [f.with_type(widened[f.name]) if f.name in widened else f for f in _fields_of(schema)]
    return Evolution(schema=pa.schema([*fields, *added]), added=added, widened=widened)


def widened_json(text: str, widened: Mapping[str, pa.DataType], new: str) -> str:
    """Return a Delta schema with some types, and new columns, from another one; the rest stays."""
    whole: dict[str, Any] = json.loads(text)
    fields: list[dict[str, Any]] = json.loads(new)["fields"]
    kinds = {f["name"]: f["type"] for f in fields}
    for one in whole["fields"]:
        if one["name"] in widened:
            one["type"] = kinds[one["name"]]
    known = {one["name"] for one in whole["fields"]}
    whole["fields"] += [f for f in fields if f["name"] not in known]
    return json.dumps(whole)


def grown_json(
    text: str, new: str, *, widened: Collection[str], last: int | None, table: str
) -> tuple[str, int]:
    """Return a Delta schema with new columns at its end, and the last id that was given.

    Args:
        text: the schema.
        new: a schema of the new columns and of those that become wider.
        widened: the latter's names; each one's story of types goes on.
        last: the highest id that any column ever had, where columns are mapped (Delta protocol,
            "Column Mapping"); each new one, and each field in it, gets the next id and a physical
            name that follows from it, so that writers who add the same column agree.
        table: the table's id.
    """
    whole: dict[str, Any] = json.loads(text)
    fields: dict[str, dict[str, Any]] = {f["name"]: f for f in json.loads(new)["fields"]}
    for one in whole["fields"]:
        if one["name"] in widened:
            kind = fields[one["name"]]["type"]
            metadata: dict[str, Any] = one.setdefault("metadata", {})
            story = metadata.setdefault("delta.typeChanges", [])
            story.append({"fromType": one["type"], "toType": kind})
            one["type"] = kind
    added = [f for name, f in fields.items() if name not in widened]
    if last is not None:
        ids = [int(n) for n in re.findall(rf'"{re.escape(_ID)}":\s*(\d+)', text)]
        counted = count(max([last, *ids]) + 1)
        added = [_numbered(one, counted, table) for one in added]
        last = next(counted) - 1
    whole["fields"] += added
    return json.dumps(whole), last or 0


def _numbered(one: dict[str, Any], counted: Iterator[int], table: str) -> dict[str, Any]:
    number = next(counted)
    name = uuid.uuid5(uuid.NAMESPACE_OID, f"{table}/{number}/{one['name']}")
    told = {_ID: number, "delta.columnMapping.physicalName": f"col-{name}"}
    metadata: dict[str, Any] = {**(one.get("metadata") or {}), **told}
    return {**one, "metadata": metadata, "type": _inside(one["type"], counted, table)}


def _inside(kind: Any, counted: Iterator[int], table: str) -> Any:
    if not isinstance(kind, dict):
        return kind
    known = cast("dict[str, Any]", kind)
    if known["type"] == "struct":
        return {**known, "fields": [_numbered(f, counted, table) for f in known["fields"]]}
    members = [k for k in ("elementType", "keyType", "valueType") if k in known]
    return {**known, **{k: _inside(known[k], counted, table) for k in members}}


def widens(narrow: Any, wide: Any) -> bool:
    """Whether a type may become another one by the protocol's list, in which no value is lost."""
    if narrow in _INTEGERS and wide in _INTEGERS:
        return _INTEGERS.index(wide) > _INTEGERS.index(narrow)
    if pa.types.is_float64(wide):
        return pa.types.is_float32(narrow) or narrow in _INTEGERS[:3]
    if pa.types.is_decimal128(wide):
        whole = wide.precision - wide.scale
        if pa.types.is_decimal128(narrow):
            longer = whole >= narrow.precision - narrow.scale and wide.scale >= narrow.scale
            return longer and wide != narrow
        return narrow in _DIGITS and whole >= _DIGITS[narrow]
    return False


def _added(schema: pa.Schema, given: pa.Schema) -> tuple[Any, ...]:
    known = {n.lower(): n for n in schema.names}
    new = [f for f in _fields_of(given) if f.name not in schema.names]
    for one in new:
        if one.name.lower() in known:
            raise LakeError(
                f"no column {one.name} can be added: Delta takes it for {known[one.name.lower()]}; "
                "give the column that name"
            )
        known[one.name.lower()] = one.name
    return tuple(_fields_of(storable(pa.schema([f.with_nullable(True) for f in new]))))


def _widened(
    schema: pa.Schema, given: pa.Schema, partition_columns: Sequence[str]
) -> dict[str, pa.DataType]:
    found: dict[str, pa.DataType] = {}
    for one in _fields_of(given):
        if one.name not in schema.names or one.name in partition_columns:
            continue
        if pa.types.is_null(one.type):
            continue
        wide = storable(pa.schema([one])).field(0).type
        if widens(schema.field(one.name).type, wide):
            found[one.name] = wide
    return found


def _fields_of(schema: pa.Schema) -> list[Any]:
    fields: Any = schema
    return list(fields)
