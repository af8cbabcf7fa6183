"""Random tables written by deltalake are read back as the rows that were written.

The expected rows and the truth of a filter are worked out in Python, with no code of the reader.
``HYPOTHESIS_PROFILE=thorough`` tries many more tables.
"""

import datetime as dt
import json
import operator
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, WriterProperties, write_deltalake
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lepton
from benchmarks.conformance_log import protocol, removed, without
from lepton.lake.read import POSITION

Row = dict[str, Any]
MOMENT = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
TEXTS = ["", "a", "b'c", "ü%20/=", "x" * 33, "x" * 33 + "y", "\\", '"', "null"]
KINDS: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "i": (pa.int64(), st.integers(-3, 3) | st.sampled_from([-(2**63), 2**63 - 1, 2**53 + 1])),
    "h": (pa.int16(), st.integers(-3, 3)),
    "f": (pa.float64(), st.sampled_from([-1.5, 0.0, -0.0, 0.1, 1e300, float("nan"), float("inf")])),
    "e": (pa.float32(), st.sampled_from([0.5, -2.0])),
    "s": (pa.string(), st.sampled_from(TEXTS)),
    "o": (pa.bool_(), st.booleans()),
    "d": (pa.date32(), st.dates(dt.date(1, 1, 1), dt.date(9999, 12, 31))),
    "t": (
        pa.timestamp("us", "UTC"),
        st.integers(-3000, 3000).map(lambda n: MOMENT + dt.timedelta(microseconds=n)),
    ),
    "m": (pa.decimal128(6, 2), st.integers(-300, 300).map(lambda n: Decimal(n).scaleb(-2))),
    "w": (
        pa.decimal128(38, 20),
        st.sampled_from([1, 2, -1]).map(lambda n: Decimal(f"123456789012345678.{n % 3:020}")),
    ),
    "b": (pa.binary(), st.binary(max_size=3)),
    "l": (pa.list_(pa.int64()), st.lists(st.none() | st.integers(0, 2), max_size=2)),
    "r": (
        pa.struct({"a": pa.int64(), "s": pa.string()}),
        st.fixed_dictionaries({"a": st.none() | st.integers(0, 2), "s": st.sampled_from(TEXTS)}),
    ),
}
PARTITIONS = ["i", "s", "o", "d", "t"]  # deltalake 1.6 writes a negative decimal as 0.-1
VALUES = {"id": st.integers(0, 12)} | {kind: KINDS[kind][1] for kind in "ihfsdtmw"}
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "<>": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass
class Written:
    """A table as written: its rows, by Python; physical name to logical name."""

    root: Path
    partition: str | None
    columns: list[str]
    rows: list[Row] = field(default_factory=list[Row])
    names: dict[str, str] = field(default_factory=dict[str, str])

    def append(self, rows: list[Row]) -> None:
        schema = pa.schema({"id": pa.int64()} | {c: KINDS[c][0] for c in self.columns})
        data = pa.Table.from_pylist(rows, schema)
        by = [self.partition] if self.partition else None
        write_deltalake(
            self.root,
            data,
            mode="append",
            schema_mode="merge",
            partition_by=by,
            writer_properties=WriterProperties(max_row_group_size=2),
        )
        if self.partition:  # the protocol has no empty string there: it is null
            rows = [{k: _logged(k, self.partition, v) for k, v in r.items()} for r in rows]
        self.rows += rows

    def delete(self, below: int) -> None:
        DeltaTable(self.root).delete(f"id < {below}")
        self.rows = [r for r in self.rows if r["id"] >= below]

    def take(self, share: int) -> None:
        """Delete by deletion vectors, as Spark does; deltalake cannot write the table after it."""
        actions: list[dict[str, Any]] = []
        for path, add in self._adds().items():
            ids = pq.read_table(self.root / unquote(path), columns=["id"])["id"].to_pylist()
            places = [n for n, number in enumerate(ids) if number % share == 0]
            if places:
                actions += [removed({"add": add}), without({"add": add}, places)]
        self._commit(protocol(["deletionVectors"]), *actions)
        self.rows = [r for r in self.rows if r["id"] % share]

    def _adds(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for commit in sorted((self.root / "_delta_log").glob("*.json")):
            for action in map(json.loads, commit.read_text().splitlines()):
                found.pop(action.get("remove", {}).get("path"), None)
                if "add" in action:
                    found[action["add"]["path"]] = action["add"]
        return found

    def _commit(self, *actions: dict[str, Any]) -> None:
        path = f"{DeltaTable(self.root).version() + 1:020}.json"
        lines = "".join(json.dumps(a) + "\n" for a in actions)
        (self.root / "_delta_log" / path).write_text(lines)

    def rename(self, features: list[str]) -> None:
        """As ALTER TABLE RENAME COLUMN does: only the metadata changes."""
        table = DeltaTable(self.root)
        fields = json.loads(table.schema().to_json())["fields"]
        number = _mapped(fields, 0)
        for one in fields:
            self.names[one["name"]] = one["name"] = f"new {one['name']}"
        metadata = table.metadata()
        commit = {
            "metaData": {
                "id": str(metadata.id),
                "format": {"provider": "parquet", "options": {}},
                "schemaString": json.dumps({"type": "struct", "fields": fields}),
                "partitionColumns": [self.names[c] for c in metadata.partition_columns],
                "configuration": {
                    "delta.columnMapping.mode": "name",
                    "delta.columnMapping.maxColumnId": str(number),
                },
                "createdTime": 0,
            }
        }
        self._commit(protocol(["columnMapping", *features]), commit)

    def expected(self) -> list[Row]:
        every = ["id", *self.columns]
        return [{self.names.get(c, c): r.get(c) for c in every} for r in self.rows]


def _logged(column: str, partition: str, value: Any) -> Any:
    return None if column == partition and value == "" else value


def _mapped(fields: list[Any], number: int) -> int:
    for one in fields:
        number += 1
        one["metadata"]["delta.columnMapping.id"] = number
        one["metadata"]["delta.columnMapping.physicalName"] = one["name"]
        if isinstance(one["type"], dict) and one["type"]["type"] == "struct":
            number = _mapped(one["type"]["fields"], number)
    return number


@st.composite
def tables(draw: st.DrawFn) -> Callable[[Path], Written]:
    """Draw what to do to a table; the doing happens in a folder that is given later."""
    columns = draw(st.lists(st.sampled_from(sorted(KINDS)), unique=True, min_size=1, max_size=4))
    can = [c for c in columns if c in PARTITIONS] if len(columns) > 1 else []
    partition = draw(st.none() | st.sampled_from(can)) if can else None
    later = draw(st.lists(st.sampled_from(sorted(KINDS)), max_size=1))
    steps: list[Any] = []
    number, known = 0, list(columns)
    for turn in range(draw(st.integers(1, 3))):
        if turn:
            known += [c for c in later if c not in known]
        rows: list[Row] = []
        for _ in range(draw(st.integers(0, 5))):
            values = {c: draw(st.none() | KINDS[c][1]) for c in known}
            rows.append({"id": (number := number + 1), **values})
        steps.append((list(known), rows))
        if draw(st.integers(0, 3)) == 0:
            steps.append(draw(st.integers(0, number + 1)))
    share, rename = draw(st.sampled_from([0, 2, 3])), draw(st.booleans())

    def make(root: Path) -> Written:
        written = Written(root, partition, [])
        for step in steps:
            if isinstance(step, int):
                written.delete(step)
            else:
                written.columns, rows = step
                written.append(rows)
        if share:
            written.take(share)
        if rename:
            written.rename(["deletionVectors"] if share else [])
        return written

    return make


def literal(value: Any) -> str:
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    if isinstance(value, dt.datetime):
        return f"CAST('{value.isoformat(sep=' ')}' AS TIMESTAMP)"
    if isinstance(value, dt.date):
        return f"CAST('{value.isoformat()}' AS DATE)"
    return format(value, "f") if isinstance(value, Decimal) else repr(value)


Truth = Callable[[Row], bool | None]


@st.composite
def conditions(draw: st.DrawFn, names: dict[str, str], depth: int = 2) -> tuple[str, Truth]:
    """Draw SQL, and what it says of a row: true, false, or None for null. Names by kind."""
    shape = draw(st.sampled_from(["leaf", "and", "or", "not"])) if depth else "leaf"
    if shape == "leaf":
        return draw(leaves(names))
    first, truth = draw(conditions(names, depth - 1))
    if shape == "not":
        return f"NOT ({first})", lambda r: None if (t := truth(r)) is None else not t
    second, other = draw(conditions(names, depth - 1))
    ends = shape == "or"  # what decides at once: true for OR, false for AND

    def joined(row: Row) -> bool | None:
        both = truth(row), other(row)
        return ends if ends in both else (None if None in both else not ends)

    return f"({first}) {shape.upper()} ({second})", joined


@st.composite
def leaves(draw: st.DrawFn, names: dict[str, str]) -> tuple[str, Truth]:
    kind = draw(st.sampled_from(["id", *names]))  # ids tell files apart
    name = names[kind]
    value = draw(VALUES[kind]) if kind in VALUES else None
    finite = value == value and value not in (None, float("inf"))
    if not finite or draw(st.integers(0, 4)) == 0:
        return f'"{name}" IS NULL', lambda r: r[name] is None
    sign = draw(st.sampled_from(sorted(OPERATORS)))
    holds = OPERATORS[sign]
    return (
        f'"{name}" {sign} {literal(value)}',
        lambda r: None if r[name] is None else holds(r[name], value),
    )


def same(found: pa.Table, expected: list[Row]) -> bool:
    return sorted(map(shown, found.to_pylist())) == sorted(map(shown, expected))


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return repr(sorted((k, shown(v)) for k, v in value.items()))
    return repr(value.timestamp() if isinstance(value, dt.datetime) else value)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(make=tables(), data=st.data())
def test_a_random_table_is_read_as_it_was_written(
    make: Callable[[Path], Written], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        written = make(Path(folder) / "t")
        expected = written.expected()
        snapshot = lepton.table(written.root)
        every = snapshot.schema.names
        chosen = data.draw(st.permutations(every))[: data.draw(st.integers(1, len(every)))]
        names = {c: written.names.get(c, c) for c in ("id", *written.columns)}
        condition, truth = data.draw(conditions(names))
        kept = [row for row in expected if truth(row) is True]
        filtered = snapshot.where(condition)

        assert same(snapshot.to_arrow(), expected)
        assert snapshot.count_rows() == len(expected)
        assert same(
            snapshot.select(chosen).to_arrow(), [{c: r[c] for c in chosen} for r in expected]
        )
        assert same(filtered.to_arrow(), kept), condition
        assert filtered.count_rows() == len(kept)
        assert same(filtered.select(chosen).to_arrow(), [{c: r[c] for c in chosen} for r in kept])
        for file in snapshot.files():
            whole = filtered.read_file(file)
            halves = [filtered.read_file(file, start=0, stop=2), filtered.read_file(file, start=2)]
            assert repr(pa.concat_tables(halves).to_pylist()) == repr(whole.to_pylist())
            assert filtered.read_file(file, start=99).num_rows == 0
            assert len(set(whole[POSITION].to_pylist())) == len(whole)
