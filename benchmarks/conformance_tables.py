"""The conformance cases: what is asked of which table, and the rows that are right.

Public tables come from tests/data/delta-tables, with rows written by Spark. The others are made
here, most of them action by action from the protocol's text, one for each thing a reader can get
wrong; their rows are stated beside them, not read back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

PUBLIC = Path(__file__).parents[1] / "tests" / "data" / "delta-tables"
Condition = tuple[str, str, Any]
Rows = list[dict[str, Any]]

GROUPS = {
    "types": "plain and nested types",
    "partitions": "partition values",
    "mapping": "column mapping",
    "deletions": "deletion vectors",
    "widening": "type widening",
    "evolution": "schema evolution",
    "timestamps": "timestamps",
    "filters": "filters",
    "log": "checkpoints and log",
    "refusal": "must be refused or right",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One question to a reader.

    Attributes:
        columns: the right columns; rows alone do not tell for an empty table.
        rows: the right rows, in any order; None where only a refusal is right.
        ask: the rows themselves, or only how many there are.
        where: column, operator (``= <> < <= > >= null``) and value: all must hold.
    """

    name: str
    group: str
    feature: str
    table: Path
    columns: list[str]
    rows: Rows | None
    ask: Literal["rows", "count"] = "rows"
    where: tuple[Condition, ...] = ()
    version: int | None = None


@dataclass(frozen=True, kw_only=True)
class Made:
    """A table that was just made: what it is, its rows, and filters to try on it.

    Attributes:
        where: conditions, each with the rows that it keeps.
        count: also ask for the number of rows alone.
        columns: as in :class:`Case`; None: those of the first row.
    """

    feature: str
    rows: Rows | None
    where: tuple[tuple[Condition, Rows], ...] = ()
    count: bool = False
    columns: list[str] | None = None
    version: int | None = None


_MAKERS: dict[str, tuple[str, Callable[[Path], Made]]] = {}


def made(group: str) -> Callable[[Callable[[Path], Made]], Callable[[Path], Made]]:
    """Enlist a function that makes a table in a folder; its name names the table."""

    def enlist(make: Callable[[Path], Made]) -> Callable[[Path], Made]:
        _MAKERS[make.__name__] = (group, make)
        return make

    return enlist


def cases(folder: Path) -> list[Case]:
    """Make the tables below ``folder`` and return every case."""
    from benchmarks import (  # noqa: F401 - they enlist their tables
        conformance_filters,
        conformance_mapping,
        conformance_schemas,
    )

    found = list(_public())
    for name, (group, make) in _MAKERS.items():
        found += _asked(name, group, folder / name, make(folder / name))
    order = list(GROUPS)
    return sorted(found, key=lambda c: order.index(c.group))


def _asked(name: str, group: str, root: Path, table: Made) -> Iterator[Case]:
    columns = table.columns or list(table.rows[0] if table.rows else ())
    same: dict[str, Any] = {"group": group, "table": root, "columns": columns}
    same["version"] = table.version
    yield Case(name=name, feature=table.feature, rows=table.rows, **same)
    if table.count:
        feature = f"{table.feature}: number of rows"
        yield Case(name=f"{name}-count", feature=feature, rows=table.rows, ask="count", **same)
    for number, (condition, rows) in enumerate(table.where, 1):
        column, operator, value = condition
        text = f"{column} IS NULL" if operator == "null" else f"{column} {operator} {value!s:.40}"
        yield Case(
            name=f"{name}-where-{number}",
            feature=f"{table.feature}: where {text}",
            rows=rows,
            where=(condition,),
            **same,
        )


_GROUP_OF = {
    "partition": "partitions",
    "special": "partitions",
    "deletion": "deletions",
    "mapping": "mapping",
    "widening": "widening",
    "evolution": "evolution",
    "int96": "timestamps",
    "timestamp": "timestamps",
    "checkpoint": "log",
    "merge": "log",
    "vacuum": "log",
}
_FIRST = ("deletion", "mapping", "widening", "evolution", "checkpoint", "timestamp", "int96")


def _public() -> Iterator[Case]:
    for entry in json.loads((PUBLIC / "index.json").read_text()):
        expected = pq.read_table(PUBLIC / entry["expected"])
        feature = str(entry["feature"]).split(";")[0]
        words = [w for w in (*_FIRST, *_GROUP_OF) if w in feature.lower()]
        same: dict[str, Any] = {
            "group": _GROUP_OF[words[0]] if words else "types",
            "table": PUBLIC / entry["table"],
            "columns": expected.column_names,
            "rows": expected.to_pylist(),
        }
        yield Case(name=entry["name"], feature=feature, **same)
        if "deletion" in feature:
            name, feature = f"{entry['name']}-count", f"{feature}: number of rows"
            yield Case(name=name, feature=feature, ask="count", **same)


def table_of(schema: dict[str, Any], **columns: list[Any]) -> pa.Table:
    """Return an Arrow table of columns with their types by name."""
    return pa.table(columns, schema=pa.schema(schema))
