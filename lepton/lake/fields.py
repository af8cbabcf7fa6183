"""Delta schemas: what a column is called, how it is stored, and what type it must come out as.

A :class:`Field` tree is built from the schema JSON of the Delta protocol (section "Schema
Serialization Format"), with the physical names and ids of section "Column Mapping". Converting
an Arrow array of a data file to its field gives nulls for what an older file does not have and
casts what has been widened since ("Type Widening"). Nothing is guessed: a type that is not
listed here is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from lepton.errors import LakeError

POSITION = "__position__"
"""Name of the int64 column that carries each row's stored position, where it is asked for."""

_PRIMITIVE: dict[str, pa.DataType] = {
    "string": pa.string(),
    "long": pa.int64(),
    "integer": pa.int32(),
    "short": pa.int16(),
    "byte": pa.int8(),
    "float": pa.float32(),
    "double": pa.float64(),
    "boolean": pa.bool_(),
    "binary": pa.binary(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us", tz="UTC"),
    "timestamp_ntz": pa.timestamp("us"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One column or nested field.

    Attributes:
        name: the logical name, as people write it.
        physical: the name inside data files.
        id: the Parquet field id in column mapping mode ``id``, else None.
        type: the logical Arrow type.
        children: struct members; the element of a list; key and value of a map.
        tag: the Parquet field id to write.
    """

    name: str
    physical: str
    id: int | None
    type: pa.DataType
    nullable: bool = True
    children: tuple[Field, ...] = ()
    comment: str | None = None
    tag: int | None = None

    def arrow(self) -> pa.Field[Any]:
        """Return the logical Arrow field."""
        metadata = {"comment": self.comment} if self.comment else None
        if self.tag is not None:
            metadata = {"PARQUET:field_id": str(self.tag)}
        return pa.field(self.name, self.type, self.nullable, metadata=metadata)


def fields_of(schema_json: str, mode: str) -> tuple[Field, ...]:
    """Parse a Delta schema; ``mode`` is the table's column mapping mode (none, name or id)."""
    return tuple(_struct_field(f, mode) for f in json.loads(schema_json)["fields"])


def _struct_field(spec: Mapping[str, Any], mode: str) -> Field:
    meta: Mapping[str, Any] = spec.get("metadata") or {}
    name = str(spec["name"])
    physical = str(meta.get("delta.columnMapping.physicalName", name)) if mode != "none" else name
    number = meta.get("delta.columnMapping.id") if mode == "id" else None
    return _field(
        name,
        spec["type"],
        mode,
        physical=physical,
        number=None if number is None else int(number),
        nullable=bool(spec.get("nullable", True)),
        comment=meta.get("comment"),
    )


def _field(
    name: str,
    kind: Any,
    mode: str,
    *,
    physical: str = "",
    number: int | None = None,
    nullable: bool = True,
    comment: str | None = None,
) -> Field:
    data_type, children = _type_of(kind, mode)
    return Field(
        name=name,
        physical=physical or name,
        id=number,
        type=data_type,
        nullable=nullable,
        children=children,
        comment=comment,
    )


def _type_of(kind: Any, mode: str) -> tuple[pa.DataType, tuple[Field, ...]]:
    if isinstance(kind, str):
        return _primitive(kind), ()
    spec = cast(Mapping[str, Any], kind)
    if spec["type"] == "struct":
        members = tuple(_struct_field(f, mode) for f in spec["fields"])
        return pa.struct([m.arrow() for m in members]), members
    if spec["type"] == "array":
        element = _field("element", spec["elementType"], mode, nullable=bool(spec["containsNull"]))
        return pa.list_(element.arrow()), (element,)
    if spec["type"] == "map":
        key = _field("key", spec["keyType"], mode, nullable=False)
        value = _field(
            "value", spec["valueType"], mode, nullable=bool(spec.get("valueContainsNull", True))
        )
        make_map: Any = pa.map_  # the stubs know types, not fields
        return make_map(key.arrow(), value.arrow()), (key, value)
    raise LakeError(f"the table has a column of type {spec['type']!r}, which lepton cannot read")


def _primitive(kind: str) -> pa.DataType:
    decimal = re.fullmatch(r"decimal\((\d+),\s*(\d+)\)", kind)
    if decimal:
        return pa.decimal128(int(decimal[1]), int(decimal[2]))
    if kind in _PRIMITIVE:
        return _PRIMITIVE[kind]
    raise LakeError(f"the table has a column of type {kind!r}, which lepton cannot read")


def locate(field: Field, stored: Any) -> int | None:
    """Return the position of ``field`` among the stored fields, or None where it is absent."""
    members: list[Any] = [stored.field(i) for i in range(_width(stored))]
    if field.id is not None:
        for i, member in enumerate(members):
            metadata = member.metadata or {}
            if metadata.get(b"PARQUET:field_id") == str(field.id).encode():
                return i
        return None
    names: list[str] = [m.name for m in members]
    if names.count(field.physical) == 1:
        return names.index(field.physical)
    alike = [i for i, name in enumerate(names) if name.lower() == field.physical.lower()]
    if len(alike) > 1:
        told = ", ".join(names[i] for i in alike)
        raise ValueError(f"column {field.name} may be any of {told} in this file")
    return alike[0] if alike else None  # names of columns are equal whatever their case


def has_ids(stored: pa.Schema) -> bool:
    """Whether any column of a file has a field id."""
    return any(b"PARQUET:field_id" in (field.metadata or {}) for field in stored)


def _width(stored: Any) -> int:
    return len(stored.names) if isinstance(stored, pa.Schema) else stored.num_fields


def convert(array: pa.Array[Any], field: Field) -> pa.Array[Any]:
    """Return ``array``, as stored, in the field's logical type (renamed, filled, widened).

    Parquet files that Arrow wrote remember Arrow's own types, such as lists of a fixed size and
    tensors; Delta knows lists.
    """
    if isinstance(array, pa.ExtensionArray):
        return convert(cast("Any", array).storage, field)
    if pa.types.is_fixed_size_list(array.type) or pa.types.is_large_list(array.type):
        array = array.cast(pa.list_(array.type.value_field))
    if pa.types.is_null(array.type):
        return nulls(len(array), field.type)
    if not holds(array.type, field.type):
        raise ValueError(f"column {field.name} is {field.type}, and this file has {array.type}")
    if not field.children:
        return _convert_primitive(array, field)
    if pa.types.is_struct(field.type):
        return _convert_struct(cast(pa.StructArray, array), field)
    if pa.types.is_map(field.type):
        return _convert_map(cast("pa.MapArray[Any, Any]", array), field)
    return _convert_list(cast("pa.ListArray[Any]", array), field)


def holds(stored: Any, declared: Any) -> bool:
    """Whether a file's type is a way to store a column's: the same one, or a narrower one."""
    if stored == declared:
        return True
    types: Any = pa.types
    if types.is_dictionary(stored):
        return holds(stored.value_type, declared)
    families = (types.is_timestamp, types.is_struct, types.is_list, types.is_map)
    if any(family(stored) and family(declared) for family in families):
        return True
    if types.is_integer(stored):  # a column of bytes is stored as 32 bits, too
        return types.is_integer(declared) or types.is_decimal(declared) or declared == pa.float64()
    if types.is_floating(stored) or types.is_decimal(stored):
        alike = types.is_floating if types.is_floating(stored) else types.is_decimal
        return bool(alike(declared)) and stored != pa.float64()
    if types.is_date(stored):
        return types.is_date(declared) or declared == pa.timestamp("us")
    return _bytes(stored) and _bytes(declared)


def _bytes(kind: Any) -> bool:
    types: Any = pa.types
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return (
        text
        or types.is_fixed_size_binary(kind)
        or (types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))
    )


def _convert_primitive(array: pa.Array[Any], field: Field) -> pa.Array[Any]:
    if array.type == field.type:
        return array
    if pa.types.is_timestamp(array.type) and pa.types.is_timestamp(field.type):
        micros = array.cast(pa.timestamp("us", tz=array.type.tz))
        return micros.cast(pa.int64()).cast(field.type)  # same instant, zone label as declared
    return array.cast(field.type)


def _convert_struct(array: pa.StructArray, field: Field) -> pa.Array[Any]:
    stored: Any = array.type
    members: list[Any] = []
    for child in field.children:
        at = locate(child, stored)
        if at is None:
            members.append(nulls(len(array), child.type))
        else:
            inner: Any = array.field(at)
            members.append(convert(inner, child))
    make: Any = pa.StructArray.from_arrays
    return make(members, fields=[c.arrow() for c in field.children], mask=pc.is_null(array))


def _convert_list(array: Any, field: Field) -> pa.Array[Any]:
    whole = _compact(array)
    values = convert(whole.values, field.children[0])
    make: Any = pa.ListArray.from_arrays
    return make(whole.offsets, values, type=field.type, mask=_mask(whole))


def _convert_map(array: Any, field: Field) -> pa.Array[Any]:
    whole = _compact(array)
    key, value = field.children
    make: Any = pa.MapArray.from_arrays
    return make(
        whole.offsets,
        convert(whole.keys, key),
        convert(whole.items, value),
        type=field.type,
        mask=_mask(whole),
    )


def _compact(array: Any) -> Any:
    """Return an array that starts at its own buffers' beginning: what from_arrays needs."""
    return pa.concat_arrays([array, array.slice(0, 0)]) if array.offset else array


def nulls(count: int, kind: pa.DataType) -> Any:
    """Return ``count`` nulls of a type."""
    make: Any = pa.nulls  # the stubs know extension types only
    return make(count, kind)


def repeat(value: Any, field: Field, rows: int) -> Any:
    """Return a partition value, in its column's type, for every row."""
    if value is None:
        return nulls(rows, field.type)
    typed: Any = pa.scalar(value)
    turned: Any = pc.cast
    make: Any = pa.repeat
    return make(turned(typed, field.type) if typed.type != field.type else typed, rows)


def _mask(array: pa.Array[Any]) -> pa.Array[Any] | None:
    return pc.is_null(array) if array.null_count else None
