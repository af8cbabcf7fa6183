"""Tables whose schema, partitions or log are easily read wrong."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake

from benchmarks.conformance_log import (
    Log,
    array_of,
    column,
    map_of,
    metadata,
    numbered,
    protocol,
    struct_of,
    widened,
)
from benchmarks.conformance_tables import Made, Rows, made, table_of

I32, I64, STR, F64 = pa.int32(), pa.int64(), pa.string(), pa.float64()
NAMES = ["a b", "a/b", "a=b", "ü", "a%20b", 'q"uote', "x:y", "", "plain", "a+b", "#?&"]


@made("partitions")
def partition_special_characters(root: Path) -> Made:
    """Paths are percent-encoded in the log, and some encoded once more in the file name."""
    data: Rows = [{"p": name, "x": n} for n, name in enumerate(NAMES) if name]
    write_deltalake(root, pa.Table.from_pylist(data), partition_by=["p"])
    kept = [row for row in data if row["p"] == "a%20b"]
    return Made(
        feature="partition values of special characters",
        rows=data,
        where=((("p", "=", "a%20b"), kept),),
    )


@made("partitions")
def partition_types(root: Path) -> Made:
    """Every type of partition value, and null in each: the log has them as text."""
    log = Log(root)
    kinds = {
        "i": ("integer", "-7", -7),
        "b": ("boolean", "true", True),
        "f": ("double", "1.5", 1.5),
        "c": ("decimal(38,10)", "-1234567890123456789012345678.0123456789", None),
        "d": ("date", "1969-12-31", dt.date(1969, 12, 31)),
        "t": ("timestamp", "1969-12-31 23:59:59.123456", None),
        "z": ("timestamp", "2021-09-08T11:11:11.000001Z", None),
        "n": ("timestamp_ntz", "0001-01-01 00:00:00", dt.datetime(1, 1, 1)),
        "s": ("string", "text", "text"),
    }
    right = {k: v[2] for k, v in kinds.items()} | {
        "c": Decimal(kinds["c"][1]),
        "t": dt.datetime(1969, 12, 31, 23, 59, 59, 123456, dt.UTC),
        "z": dt.datetime(2021, 9, 8, 11, 11, 11, 1, dt.UTC),
    }
    columns = [*(column(k, v[0]) for k, v in kinds.items()), column("x", "long")]
    log.commit(
        protocol(["timestampNtz"]),
        metadata(columns, list(kinds)),
        log.add("1.parquet", table_of({"x": I64}, x=[1]), {k: v[1] for k, v in kinds.items()}),
        log.add("2.parquet", table_of({"x": I64}, x=[2]), dict.fromkeys(kinds)),
        log.add("3.parquet", table_of({"x": I64}, x=[3]), dict.fromkeys(kinds, "")),
    )
    nothing: Rows = [dict.fromkeys(kinds, None) | {"x": x} for x in (2, 3)]
    expected: Rows = [right | {"x": 1}, *nothing]
    where = ((("i", "<", 0), expected[:1]), (("d", "null", None), nothing))
    return Made(feature="partition values of every type, null", rows=expected, where=where)


@made("partitions")
def partition_stored_too(root: Path) -> Made:
    """Some writers store partition columns in the file as well; the log's value counts."""
    log = Log(root)
    rows = table_of({"p": STR, "x": I64}, p=["stale"], x=[1])
    log.commit(
        protocol(reader=1, writer=2),
        metadata([column("p", "string"), column("x", "long")], ["p"]),
        log.add("1.parquet", rows, {"p": "log"}),
    )
    return Made(
        feature="partition column stored too, with another value", rows=[{"p": "log", "x": 1}]
    )


@made("partitions")
def partition_only(root: Path) -> Made:
    """A file that stores nothing but its partition's one other, later column: rows still count."""
    log = Log(root)
    columns = [column("p", "long"), column("x", "long"), column("later", "string")]
    log.commit(
        protocol(reader=1, writer=2),
        metadata(columns, ["p"]),
        log.add("p=1/1.parquet", table_of({"x": I64}, x=[1, 2]), {"p": "1"}),
    )
    expected: Rows = [{"p": 1, "x": x, "later": None} for x in (1, 2)]
    where = ((("later", "null", None), expected), (("p", "<>", 1), []))
    return Made(feature="partitioned, a column that no file has", rows=expected, where=where)


@made("evolution")
def evolution_appended(root: Path) -> Made:
    """A column that later files have; asked for in the version before it, too."""
    write_deltalake(root, pa.table({"x": [1, 2]}))
    write_deltalake(root, pa.table({"x": [3], "y": ["u"]}), mode="append", schema_mode="merge")
    expected: Rows = [{"x": 1, "y": None}, {"x": 2, "y": None}, {"x": 3, "y": "u"}]
    where = (
        (("y", "null", None), expected[:2]),
        (("y", "=", "u"), expected[2:]),
        (("y", "<>", "v"), expected[2:]),
    )
    return Made(feature="column added later", rows=expected, where=where)


@made("evolution")
def evolution_older_version(root: Path) -> Made:
    """The version before a column came."""
    evolution_appended(root)
    return Made(feature="version before a column came", rows=[{"x": 1}, {"x": 2}], version=0)


@made("evolution")
def evolution_nested(root: Path) -> Made:
    """A member added inside a list of structs; a null struct stays null."""
    log = Log(root)
    member = struct_of(column("a", "integer"), column("b", "long"))
    old, new = pa.struct({"a": I32}), pa.struct({"a": I32, "b": I64})
    first = table_of({"s": old, "l": pa.list_(old)}, s=[{"a": 1}, None], l=[[{"a": 2}, None], []])
    later = table_of({"s": new, "l": pa.list_(new)}, s=[{"a": None, "b": 9}], l=[None])
    log.commit(
        protocol(reader=1, writer=2),
        metadata([column("s", member), column("l", array_of(member))]),
        log.add("1.parquet", first),
        log.add("2.parquet", later),
    )
    expected: Rows = [
        {"s": {"a": 1, "b": None}, "l": [{"a": 2, "b": None}, None]},
        {"s": None, "l": []},
        {"s": {"a": None, "b": 9}, "l": None},
    ]
    return Made(feature="nested member added later", rows=expected)


@made("evolution")
def evolution_order(root: Path) -> Made:
    """Files have columns in an order of their own, and one that the schema no longer has."""
    log = Log(root)
    rows = table_of({"gone": STR, "b": STR, "a": I64}, gone=["z"], b=["u"], a=[1])
    columns = [column("a", "long"), column("b", "string")]
    log.commit(protocol(reader=1, writer=2), metadata(columns), log.add("1.parquet", rows))
    return Made(feature="other order of columns in the file", rows=[{"a": 1, "b": "u"}])


@made("types")
def empty_table(root: Path) -> Made:
    """No files at all: still columns."""
    schema = pa.schema({"x": pa.int64(), "s": pa.string()})
    DeltaTable.create(root, schema)
    where = ((("x", ">", 1), []),)
    return Made(feature="empty table", rows=[], columns=["x", "s"], where=where)


@made("types")
def dotted_names(root: Path) -> Made:
    """A column named like a path into another one."""
    log = Log(root)
    columns = [
        column("a", struct_of(column("b", "long", "b", 2)), "a", 1),
        column("a.b", "long", "a.b", 3),
    ]
    inner = pa.struct([numbered("b", I64, 2)])
    stored = pa.schema([numbered("a", inner, 1), numbered("a.b", I64, 3)])
    rows = pa.table([[{"b": 1}], [2]], schema=stored)
    log.commit(
        protocol(["columnMapping"]),
        metadata(columns, columnMapping_mode="name", columnMapping_maxColumnId="3"),
        log.add("1.parquet", rows),
    )
    expected: Rows = [{"a": {"b": 1}, "a.b": 2}]
    where = ((("a.b", "=", 2), expected), (("a.b", "=", 1), []))
    return Made(feature="dots in names of columns", rows=expected, where=where)


@made("types")
def arrow_encodings(root: Path) -> Made:
    """Files whose embedded Arrow schema says dictionary, large and view types."""
    log = Log(root)
    some = pa.array(["u", None, "u"], STR)
    rows = pa.table(
        {
            "d": some.dictionary_encode(),
            "l": some.cast(pa.large_string()),
            "v": some.cast(pa.string_view()),
            "n": pa.array([[1], None, []], pa.large_list(I64)),
            "b": pa.array([b"x", None, b""], pa.large_binary()),
        }
    )
    kinds = dict.fromkeys("dlv", "string") | {"n": array_of("long"), "b": "binary"}
    columns = [column(n, kind) for n, kind in kinds.items()]
    log.commit(protocol(reader=1, writer=2), metadata(columns), log.add("1.parquet", rows))
    expected: Rows = [
        {"d": "u", "l": "u", "v": "u", "n": [1], "b": b"x"},
        dict.fromkeys("dlvnb", None),
        {"d": "u", "l": "u", "v": "u", "n": [], "b": b""},
    ]
    where = ((("d", "=", "u"), [expected[0], expected[2]]), (("v", "null", None), expected[1:2]))
    return Made(feature="dictionary, large and view types in files", rows=expected, where=where)


@made("types")
def decimals_long(root: Path) -> Made:
    """Decimals of 38 digits: a literal that goes through a double matches the wrong rows."""
    log = Log(root)
    text = ["1234567890123456789012345678.0000000001", "1234567890123456789012345678.0000000002"]
    low, high = map(Decimal, text)
    rows = table_of({"d": pa.decimal128(38, 10)}, d=[low, high])
    stats = {"minValues": {"d": float(low)}, "maxValues": {"d": float(high)}, "nullCount": {"d": 0}}
    add = log.add("1.parquet", rows, stats=stats)
    log.commit(protocol(reader=1, writer=2), metadata([column("d", "decimal(38,10)")]), add)
    expected: Rows = [{"d": low}, {"d": high}]
    where = ((("d", "=", high), expected[1:]), (("d", ">", low), expected[1:]))
    return Made(feature="long decimals", rows=expected, where=where)


@made("widening")
def widening_all(root: Path) -> Made:
    """One file from before each column was widened, one from after."""
    log = Log(root)
    columns = [
        widened("l", "integer", "long"),
        widened("d", "float", "double"),
        widened("m", "decimal(5,2)", "decimal(12,4)"),
        widened("t", "date", "timestamp_ntz"),
    ]
    narrow = {"l": I32, "d": pa.float32(), "m": pa.decimal128(5, 2), "t": pa.date32()}
    wide = {"l": I64, "d": F64, "m": pa.decimal128(12, 4), "t": pa.timestamp("us")}
    before = {"l": 1, "d": 0.1, "m": Decimal("1.25"), "t": dt.date(2020, 1, 2)}
    after = {"l": 2**40, "d": 0.1, "m": Decimal("1.2501"), "t": dt.datetime(2020, 1, 2, 3, 4)}

    def add(name: str, kinds: dict[str, Any], values: dict[str, Any]) -> Any:
        said = {k: v if k in "ld" else str(v).replace(" ", "T") for k, v in values.items()}
        said["m"] = float(values["m"])
        stats = {"minValues": said, "maxValues": said, "nullCount": dict.fromkeys("ldmt", 0)}
        return log.add(name, table_of(kinds, **{k: [v] for k, v in values.items()}), stats=stats)

    log.commit(
        protocol(["typeWidening", "timestampNtz"]),
        metadata(columns, enableTypeWidening="true"),
        add("1.parquet", narrow, before),
        add("2.parquet", wide, after),
    )
    stored = 0.10000000149011612  # the float 0.1 as a double
    first = before | {"d": stored, "t": dt.datetime(2020, 1, 2)}
    expected: Rows = [first, after]
    where = (
        (("d", ">", 0.1), expected[:1]),
        (("d", "=", stored), expected[:1]),
        (("d", "<=", 0.1), expected[1:]),
        (("l", ">", 2**33), expected[1:]),
        (("m", "=", Decimal("1.25")), expected[:1]),
        (("t", ">", dt.datetime(2020, 1, 2, 1)), expected[1:]),
    )
    return Made(feature="type widening", rows=expected, where=where)


@made("widening")
def widening_nested(root: Path) -> Made:
    """Widened inside a struct, a list and a map."""
    log = Log(root)
    kinds: dict[str, Any] = {
        "s": struct_of(widened("x", "integer", "long")),
        "l": array_of("long"),
        "m": map_of("string", "double"),
    }
    narrow = {"s": pa.struct({"x": I32}), "l": pa.list_(I32), "m": pa.map_(STR, pa.float32())}
    wide = {"s": pa.struct({"x": I64}), "l": pa.list_(I64), "m": pa.map_(STR, F64)}
    log.commit(
        protocol(["typeWidening"]),
        metadata([column(n, k) for n, k in kinds.items()]),
        log.add("1.parquet", table_of(narrow, s=[{"x": 1}], l=[[1, None]], m=[[("k", 0.5)]])),
        log.add("2.parquet", table_of(wide, s=[{"x": 2**40}], l=[[2**40]], m=[None])),
    )
    expected: Rows = [
        {"s": {"x": 1}, "l": [1, None], "m": [("k", 0.5)]},
        {"s": {"x": 2**40}, "l": [2**40], "m": None},
    ]
    return Made(feature="type widening, nested", rows=expected)
