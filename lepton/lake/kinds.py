"""Which of Delta's types holds a column of Arrow's: the one in which every value stays the same.

Pure. Delta has no unsigned or half-precision numbers, one kind of timestamp (microseconds; an
instant is in UTC) and one of lists.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from lepton.errors import LakeError
from lepton.lake.fields import POSITION

_WIDER = {
    pa.uint8(): pa.int16(),
    pa.uint16(): pa.int32(),
    pa.uint32(): pa.int64(),
    pa.uint64(): pa.int64(),
    pa.float16(): pa.float32(),
    pa.large_string(): pa.string(),
    pa.string_view(): pa.string(),
    pa.large_binary(): pa.binary(),
    pa.binary_view(): pa.binary(),
    pa.date64(): pa.date32(),
}
_SAME = (
    pa.types.is_boolean,
    pa.types.is_signed_integer,
    pa.types.is_floating,
    pa.types.is_string,
    pa.types.is_binary,
    pa.types.is_date32,
)


def storable(schema: pa.Schema) -> pa.Schema:
    """Return the schema in types that a Delta table can have.

    Raises:
        LakeError: a column has a type without a counterpart, or a name that it cannot have.
    """
    fields: Any = schema
    if POSITION in schema.names:
        raise LakeError(f"a column cannot be called {POSITION}, which lepton needs for itself")
    _refuse_alike(schema.names, "columns")
    return pa.schema([_field(f, f.name) for f in fields])


def _refuse_alike(names: Iterable[str], what: str) -> None:
    seen: dict[str, str] = {}
    for name in names:
        if name.lower() in seen:
            raise LakeError(f"{what} {seen[name.lower()]} and {name} are one to Delta: rename one")
        seen[name.lower()] = name


def _field(field: Any, path: str) -> Any:
    return pa.field(field.name, _kind(field.type, path), nullable=field.nullable)


def _kind(kind: Any, path: str) -> Any:
    if isinstance(kind, pa.BaseExtensionType):
        return _kind(kind.storage_type, path)
    if kind in _WIDER:
        return _WIDER[kind]
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us") if kind.tz is None else pa.timestamp("us", tz="UTC")
    if pa.types.is_dictionary(kind):
        return _kind(kind.value_type, path)
    if pa.types.is_fixed_size_binary(kind):
        return pa.binary()
    if pa.types.is_nested(kind):
        return _nested(kind, path)
    if pa.types.is_decimal(kind) and kind.bit_width <= 128 and kind.scale >= 0:
        return pa.decimal128(kind.precision, kind.scale)
    if any(holds(kind) for holds in _SAME):
        return kind
    raise LakeError(
        f"column {path} is {kind}, which Delta has no type for: convert it, such as times and "
        "durations to numbers, or leave it out"
    )


def _nested(kind: Any, path: str) -> Any:
    if pa.types.is_struct(kind):
        members = [kind.field(i) for i in range(kind.num_fields)]
        _refuse_alike((m.name for m in members), f"fields of column {path}:")
        return pa.struct([_field(m, f"{path}.{m.name}") for m in members])
    if pa.types.is_map(kind):
        key = _kind(kind.key_type, f"{path}.key")
        make: Any = pa.map_
        return make(key, _field(kind.item_field, f"{path}.value"))
    if hasattr(kind, "value_field"):
        return pa.list_(_field(kind.value_field, f"{path}.element"))
    raise LakeError(f"column {path} is {kind}, which Delta has no type for: convert it")
