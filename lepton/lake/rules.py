"""What a table asks of its writers, and what of that lepton and deltalake can honour.

Writer features are an allow-list, as the Delta protocol demands (section "Writer Version
Requirements"): a table that asks for more is refused by the feature's name, before any work.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
from deltalake import DeltaTable

from lepton.errors import LakeError
from lepton.lake.fields import Field, fields_of
from lepton.lake.mapping import storing
from lepton.lake.rows import constraint_expression

WRITER_FEATURES = frozenset(
    {
        "allowColumnDefaults",  # a write has a value for each column
        "appendOnly",
        "changeDataFeed",
        "checkConstraints",
        "columnMapping",
        "domainMetadata",
        "inCommitTimestamp",
        "deletionVectors",
        "generatedColumns",  # refused below where a column is one
        "invariants",
        "timestampNtz",
        "typeWidening",
        "typeWidening-preview",
        "v2Checkpoint",
        "vacuumProtocolCheck",
    }
)
_OF_NEW_ROWS = ("identityColumns",)
_WIDENING = frozenset({"typeWidening", "typeWidening-preview"})
_OURS = _WIDENING | frozenset(
    {"allowColumnDefaults", "columnMapping", "domainMetadata", "inCommitTimestamp"}
    | {"vacuumProtocolCheck"}
)
"""Of these deltalake writes no table: the commits are lepton's own."""
_RULES = ("delta.invariants", "delta.generationExpression")
_CONSTRAINT = "delta.constraints."
_FEED = "delta.enableChangeDataFeed"
_OF_FEEDS = ("_change_type", "_commit_version", "_commit_timestamp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """What rows must be to go into a table.

    Attributes:
        what: the table's name in messages: uri@version.
        schema: the logical Arrow schema, with nullability.
        partition_columns: in the table's order.
        constraints: CHECK constraints and invariants, by name.
        append_only: rows may not be changed or deleted.
        feed: the table keeps a change data feed.
        stored: how a table with column mapping stores its columns.
        own: only lepton can write its commits, not deltalake.
        stamped: commits carry their time.
        widening: types may become wider in files that stay.
    """

    what: str
    schema: pa.Schema
    partition_columns: tuple[str, ...]
    constraints: Mapping[str, str]
    append_only: bool = False
    feed: bool = False
    stored: tuple[Field, ...] = ()
    own: bool = False
    stamped: bool = False
    widening: bool = False


def rules_of(opened: DeltaTable, uri: str, *, same_rows: bool = False) -> Rules:
    """Return the rules of an open table.

    Args:
        opened: the table.
        uri: its name in messages.
        same_rows: only rows that the table has will be written: what it asks of new ones is left.

    Raises:
        LakeError: it asks for something that lepton does not do when it writes.
    """
    what = f"{uri!r}@{opened.version()}"
    metadata = opened.metadata()
    properties: dict[str, Any] = dict(metadata.configuration)
    text = opened.schema().to_json()
    specs: list[dict[str, Any]] = json.loads(text)["fields"]
    _refuse(opened, properties, [] if same_rows else specs, what, _OF_NEW_ROWS if same_rows else ())
    try:
        schema = pa.schema([f.arrow() for f in fields_of(text, "none")])
        constraints = {} if same_rows else _constraints(properties) | _invariants(specs)
        for name, condition in constraints.items():
            constraint_expression(name, condition, schema)
    except LakeError as e:
        raise LakeError(f"cannot write to table {what}: {e}") from e
    mapped = str(properties.get("delta.columnMapping.mode", "none")) != "none"
    return Rules(
        what=what,
        schema=schema,
        partition_columns=tuple(metadata.partition_columns),
        constraints=constraints,
        append_only=_is_on(properties, "delta.appendOnly"),
        feed=_is_on(properties, _FEED),
        stored=storing(text) if mapped else (),
        own=mapped or bool(_OURS & set(opened.protocol().writer_features or [])),
        stamped=_is_on(properties, "delta.enableInCommitTimestamps"),
        widening=_is_on(properties, "delta.enableTypeWidening")
        and bool(_WIDENING & set(opened.protocol().writer_features or [])),
    )


def _is_on(properties: Mapping[str, Any], name: str) -> bool:
    return str(properties.get(name, "")).lower() == "true"


def _constraints(properties: Mapping[str, Any]) -> dict[str, str]:
    named = {k: str(v) for k, v in properties.items() if k.startswith(_CONSTRAINT)}
    return {k.removeprefix(_CONSTRAINT): v for k, v in named.items()}


def _refuse(
    opened: DeltaTable,
    properties: Mapping[str, Any],
    specs: list[dict[str, Any]],
    what: str,
    more: tuple[str, ...],
) -> None:
    protocol = opened.protocol()
    asks = sorted(set(protocol.writer_features or []) - WRITER_FEATURES - set(more))
    if protocol.min_writer_version > 7:
        asks.append(f"writer version {protocol.min_writer_version}")
    for spec in specs:
        keys = list(spec.get("metadata") or {})
        if "delta.generationExpression" in keys:
            asks.append(f"generatedColumns (column {spec['name']})")
        if any(k.startswith("delta.identity.") for k in keys):
            asks.append(f"identityColumns (column {spec['name']})")
    if _is_on(properties, _FEED):
        told = [s["name"] for s in specs if str(s["name"]).lower() in _OF_FEEDS]
        asks += [f"a change data feed beside a column {name} of its own" for name in told]
    asks += [f"{key} inside column {name}" for name, key in _inside(specs)]
    if asks:
        raise LakeError(
            f"table {what} asks its writers for {', '.join(asks)}, which lepton does not do; "
            "write to it with the engine that made it, or to a copy without this"
        )


def _inside(specs: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Rules of fields inside columns."""
    for spec in specs:
        waiting: list[Any] = [spec["type"]]
        while waiting:
            at = waiting.pop()
            if not isinstance(at, dict):
                continue
            kind = cast("dict[str, Any]", at)
            members: list[dict[str, Any]] = kind.get("fields") or []
            for member in members:
                keys: dict[str, Any] = member.get("metadata") or {}
                yield from ((spec["name"], key) for key in keys if key in _RULES)
            waiting += [m["type"] for m in members]
            waiting += [kind.get(k) for k in ("elementType", "keyType", "valueType")]


def _invariants(specs: list[dict[str, Any]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for spec in specs:
        metadata: dict[str, Any] = spec.get("metadata") or {}
        text = metadata.get("delta.invariants")
        if text:
            found[f"of column {spec['name']}"] = json.loads(text)["expression"]["expression"]
    return found
