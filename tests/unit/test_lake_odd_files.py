"""Data files and partition values that are odd: every value comes out, or the file is refused."""

import datetime as dt
import math
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, QueryBuilder

import lepton
from benchmarks.conformance_log import (
    Action,
    Log,
    array_of,
    column,
    map_of,
    metadata,
    protocol,
    struct_of,
)
from lepton.errors import LakeError
from lepton.lake.maintenance import vacuum

UTC = dt.UTC
OLD, FAR = dt.datetime(1500, 1, 1, tzinfo=UTC), dt.datetime(9999, 12, 31, 23, 59, 59, 1, tzinfo=UTC)
FINEST = dt.datetime(1970, 1, 1, 0, 16, 40, 1, tzinfo=UTC)
FEATURES = ["timestampNtz"]
map_type: Any = pa.map_


def stored(root: Path, columns: list[Action], rows: pa.Table, **parquet: Any) -> Path:
    """A table of one file."""
    log = Log(root)
    log.commit(protocol(FEATURES), metadata(columns))
    log.commit(log.add("a.parquet", rows, stats={}, **parquet))
    return root


def shown(value: Any) -> Any:
    """A value so that equal ones are equal: NaN, zones by any name, members in any order."""
    if isinstance(value, dict):
        return sorted((k, shown(v)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return [shown(v) for v in value]
    if isinstance(value, dt.datetime) and value.tzinfo is not None:
        return f"{value.replace(tzinfo=None)} {value.utcoffset()}"
    return repr(value)


def read(root: Path) -> list[Any]:
    snapshot = lepton.table(root)
    found = snapshot.to_arrow()
    found.validate(full=True)
    assert snapshot.count_rows() == len(found)
    file = snapshot.files()[0] if snapshot.files() else None
    if file is not None and len(found):  # the same, cut into ranges
        step = 1 + len(found) // 9
        starts = range(0, len(found), step)
        parts = [snapshot.read_file(file, start=n, stop=n + step) for n in starts]
        cut = pa.concat_tables(parts).drop_columns("__position__")
        assert shown(cut.to_pylist()) == shown(found.to_pylist())
    return found.to_pylist()


MANY = pa.table(
    {
        "x": pa.array([None if i % 7 == 0 else i for i in range(90)], pa.int64()),
        "s": pa.array([None if i % 11 == 0 else f"word {i % 13}" for i in range(90)]),
        "f": pa.array([i / 3 for i in range(90)]),
        "l": pa.array(
            [None if i % 5 == 0 else [None, *range(i % 4)] for i in range(90)],
            pa.list_(pa.int64()),
        ),
    }
)
COLUMNS = [column("x", "long"), column("s", "string"), column("f", "double")]
COLUMNS += [column("l", array_of("long"))]
DELTAS = {"x": "DELTA_BINARY_PACKED", "s": "DELTA_BYTE_ARRAY", "f": "BYTE_STREAM_SPLIT"}
WAYS: list[dict[str, Any]] = [
    *({"compression": c, "row_group_size": 20} for c in ("none", "gzip", "brotli", "zstd", "lz4")),
    {"data_page_version": "2.0", "row_group_size": 7, "compression": "zstd"},
    {"use_dictionary": False, "column_encoding": DELTAS, "data_page_version": "2.0"},
    {"use_dictionary": False, "column_encoding": {"s": "DELTA_LENGTH_BYTE_ARRAY"}},
    {"data_page_size": 1, "write_batch_size": 3, "write_page_index": True},
    {"version": "1.0", "row_group_size": 1},
    {"use_compliant_nested_type": False, "store_schema": False},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda w: "-".join(map(str, w.values()))[:40])
def test_every_way_to_write_parquet_is_read(tmp_path: Path, way: dict[str, Any]) -> None:
    assert read(stored(tmp_path / "t", COLUMNS, MANY, **way)) == MANY.to_pylist()


MICROS = pa.timestamp("us", "UTC")
INNER = [{"b": None}, {"b": "x"}, None]
NESTED = pa.table(
    {
        "g": pa.array(
            [None, {"a": None, "l": None}, {"a": 1, "l": INNER}, {"a": 2, "l": []}],
            pa.struct({"a": pa.int64(), "l": pa.list_(pa.struct({"b": pa.string()}))}),
        ),
        "m": pa.array(
            [None, [], [("k", None)], [("k", [None, 1]), ("j", [])]],
            map_type(pa.string(), pa.list_(pa.int64())),
        ),
    }
)
LISTED = array_of(struct_of(column("b", "string")))
NEST = [column("g", struct_of(column("a", "long"), column("l", LISTED)))]
NEST += [column("m", map_of("string", array_of("long")))]
VALUES: list[tuple[str, Any, Any]] = [
    ("short", pa.array([255, 0], pa.uint8()), None),
    ("long", pa.array([2**32 - 1], pa.uint32()), None),
    ("integer", pa.array([5, -5], pa.int64()), None),
    ("timestamp", pa.array([OLD, None, FAR], MICROS), None),
    ("timestamp", pa.array([1_000_000_001_000], pa.timestamp("ns", "UTC")), [FINEST]),
    ("timestamp_ntz", pa.array([dt.datetime(1, 1, 1), None], pa.timestamp("us")), None),
    ("date", pa.array([dt.date(1, 1, 1), dt.date(1582, 10, 4), dt.date(9999, 12, 31)]), None),
    ("date", pa.array([dt.date(1969, 12, 31)], pa.date64()), None),
    (
        "decimal(38,0)",
        pa.array([Decimal("9" * 38), Decimal("-" + "9" * 38), None], pa.decimal128(38, 0)),
        None,
    ),
    ("string", pa.array(["a", "b", None, "a"]).dictionary_encode(), None),
    ("string", pa.array(["z" * 1_000_000, "", None]), None),
    ("string", pa.array(["a", None], pa.string_view()), None),
    ("string", pa.nulls(2), None),
    ("binary", pa.array([b"", b"\0\xff", None]), None),
    ("boolean", pa.array([True, None, False]), None),
    ("float", pa.array([-0.0, float("nan"), float("-inf")], pa.float32()), None),
    ("long", pa.array([], pa.int64()), None),
]


@pytest.mark.parametrize(("kind", "values", "expected"), VALUES, ids=[v[0] for v in VALUES])
@pytest.mark.parametrize("small", [False, True])
def test_every_value_comes_out(
    tmp_path: Path, kind: str, values: Any, expected: list[Any] | None, small: bool
) -> None:
    wanted = values.to_pylist() if expected is None else expected
    more: dict[str, Any] = {"row_group_size": 1, "store_schema": False} if small else {}
    root = stored(tmp_path / "t", [column("v", kind)], pa.table({"v": values}), **more)
    assert shown([r["v"] for r in read(root)]) == shown(wanted)


def test_decimals_that_are_stored_as_integers(tmp_path: Path) -> None:
    rows = pa.table({"d": pa.array([Decimal("-1.23"), None], pa.decimal128(5, 2))})
    columns = [column("d", "decimal(5,2)")]
    assert read(stored(tmp_path / "t", columns, rows, store_decimal_as_integer=True)) == (
        rows.to_pylist()
    )


def test_int96_inside_other_columns_before_1800_and_after_2262(tmp_path: Path) -> None:
    rows = pa.table(
        {
            "g": pa.array([{"t": OLD}, None], pa.struct({"t": MICROS})),
            "l": pa.array([[FAR, None], []], pa.list_(MICROS)),
        }
    )
    columns = [column("g", struct_of(column("t", "timestamp"))), column("l", array_of("timestamp"))]
    root = stored(tmp_path / "t", columns, rows, use_deprecated_int96_timestamps=True)
    assert shown(read(root)) == shown(rows.to_pylist())


@pytest.mark.parametrize("groups", [1, 9])
def test_nulls_at_every_depth_and_members_that_came_later(tmp_path: Path, groups: int) -> None:
    root = stored(tmp_path / "t", NEST, NESTED, row_group_size=groups)
    assert read(root) == NESTED.to_pylist()
    later = array_of(struct_of(column("c", "long"), column("b", "string")))
    inside = struct_of(column("z", "date"), column("l", later), column("a", "long"))
    grown = [column("g", inside), NEST[1], column("new", map_of("string", "date"))]
    found = read(stored(tmp_path / "u", grown, NESTED, row_group_size=groups))

    assert [r["m"] for r in found] == NESTED["m"].to_pylist()
    assert {r["new"] for r in found} == {None}
    assert [r["g"] for r in found] == [
        None,
        {"z": None, "l": None, "a": None},
        {"z": None, "l": [None if i is None else {"c": None, **i} for i in INNER], "a": 1},
        {"z": None, "l": [], "a": 2},
    ]


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("integer", pa.table({"v": pa.array([2**32 - 1], pa.uint32())})),
        ("integer", pa.table({"v": pa.array([2**40])})),
        ("long", pa.table({"v": pa.array([2**64 - 1], pa.uint64())})),
        ("string", pa.table({"v": pa.array([b"\xff\xfe"])})),
        ("long", pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["v", "v"])),
    ],
    ids=["unsigned", "too large", "beyond all", "no text", "twice"],
)
def test_what_does_not_fit_its_column_names_the_file(
    tmp_path: Path, kind: str, rows: pa.Table
) -> None:
    root = stored(tmp_path / "t", [column("v", kind)], rows)
    with pytest.raises(LakeError, match=rf"{re.escape(str(root))}/a\.parquet.*t'@1"):
        lepton.table(root).to_arrow()


PARTS: list[tuple[str, str, Any]] = [
    ("timestamp", "2020-01-01T00:00:00.000000Z", dt.datetime(2020, 1, 1, tzinfo=UTC)),
    ("timestamp", "2020-01-01 00:00:00.1", dt.datetime(2020, 1, 1, 0, 0, 0, 100_000, tzinfo=UTC)),
    ("timestamp", "2020-01-01T02:00:00+02:00", dt.datetime(2020, 1, 1, tzinfo=UTC)),
    ("timestamp", "0001-01-01 00:00:00", dt.datetime(1, 1, 1, tzinfo=UTC)),
    ("date", "0001-01-01", dt.date(1, 1, 1)),
    ("long", "+5", 5),
    ("integer", "-007", -7),
    ("double", "1e3", 1000.0),
    ("double", "-Infinity", -math.inf),
    ("double", "NaN", math.nan),
    ("boolean", "TRUE", True),
    ("decimal(10,2)", "-0.10", Decimal("-0.10")),
    ("decimal(38,10)", f"-{'9' * 28}.{'1' * 10}", Decimal(f"-{'9' * 28}.{'1' * 10}")),
    ("binary", "\u0001\u0002", b"\x01\x02"),
    ("string", "__HIVE_DEFAULT_PARTITION__", "__HIVE_DEFAULT_PARTITION__"),
    ("string", " a ", " a "),
    ("string", "null", "null"),
    ("string", "a\0b", "a\0b"),
    ("string", "y" * 5000, "y" * 5000),
    ("long", "", None),
    ("string", "", None),
]


def partitioned(root: Path, kind: str, values: dict[str, str | None]) -> Path:
    log = Log(root)
    columns = [column("x", "long"), column("p", kind)]
    log.commit(protocol(reader=1, writer=2), metadata(columns, ["p"]))
    log.commit(log.add("a.parquet", pa.table({"x": [1]}), values, stats={}))
    return root


@pytest.mark.parametrize(("kind", "text", "value"), PARTS, ids=[f"{p[0]} {p[1]:.9}" for p in PARTS])
def test_a_partition_value_is_read_as_it_may_be_written(
    tmp_path: Path, kind: str, text: str, value: Any
) -> None:
    root = partitioned(tmp_path / "t", kind, {"p": text})
    assert shown(read(root)) == shown([{"x": 1, "p": value}])


def test_a_partition_value_that_is_not_there_is_null(tmp_path: Path) -> None:
    assert read(partitioned(tmp_path / "t", "string", {})) == [{"x": 1, "p": None}]


@pytest.mark.parametrize(
    ("kind", "text"),
    [("byte", "300"), ("integer", "seven"), ("boolean", "1"), ("decimal(4,2)", "123456.00")],
)
def test_a_partition_value_that_does_not_fit_is_refused(
    tmp_path: Path, kind: str, text: str
) -> None:
    root = partitioned(tmp_path / "t", kind, {"p": text})
    with pytest.raises(LakeError, match=re.escape(str(root))):
        lepton.table(root).to_arrow()


TENTHS = [Decimal("0"), Decimal("1.5"), Decimal("-1e-10"), Decimal("1234567890123456789012345678")]
WRITTEN: list[Any] = [
    pa.array(TENTHS, pa.decimal128(38, 10)),
    pa.array([math.nan, math.inf, -math.inf, -0.0, 1e300, 0.1, 1e20]),
    pa.array([0.1, 3.4e38], pa.float32()),
    pa.array([dt.datetime(1, 1, 1, tzinfo=UTC), FAR], MICROS),
    pa.array([dt.datetime(1, 1, 1), dt.datetime(2020, 1, 1, 0, 0, 0, 5)], pa.timestamp("us")),
    pa.array([dt.date(1, 1, 1), dt.date(9999, 12, 31)]),
    pa.array(["a b", "ü", "a/b", "..", "%20", "'\"", "a\nb", "x" * 3000, "null", " ", "\\", "#?"]),
    pa.array([True, False, None]),
    pa.array([-(2**63), 2**63 - 1]),
]


@pytest.mark.parametrize("values", WRITTEN, ids=[str(v.type) for v in WRITTEN])
def test_a_partition_value_that_was_written_comes_back_to_others_too(
    tmp_path: Path, values: Any
) -> None:
    rows = pa.table({"x": np.arange(len(values)), "p": values})
    snapshot = lepton.write(rows, tmp_path / "t", partition_by=["p"])
    others = QueryBuilder().register("t", DeltaTable(tmp_path / "t"))
    theirs = pa.table(others.execute("SELECT x, p FROM t ORDER BY x").read_all())

    assert shown(snapshot.to_arrow().sort_by("x")["p"].to_pylist()) == shown(values.to_pylist())
    assert shown(theirs["p"].to_pylist()) == shown(values.to_pylist())


def test_a_decimals_text_has_no_exponent(tmp_path: Path) -> None:
    rows = pa.table({"x": [1], "p": pa.array([Decimal(0)], pa.decimal128(38, 10))})
    lepton.write(rows, tmp_path / "t", partition_by=["p"])
    adds: Any = pa.table(DeltaTable(tmp_path / "t").get_add_actions(flatten=True))
    log = (tmp_path / "t/_delta_log" / f"{0:020}.json").read_text()
    assert '"0.0000000000"' in log
    assert len(adds) == 1


def test_a_vacuum_beneath_a_reader_is_named(tmp_path: Path) -> None:
    root = tmp_path / "t"
    old = lepton.write(pa.table({"x": [1]}), root)
    lepton.write(pa.table({"x": [2]}), root, mode="overwrite")
    DeltaTable(root).alter.set_table_properties(
        {"delta.deletedFileRetentionDuration": "interval 0 hours"}
    )
    vacuum(root, dry_run=False)
    with pytest.raises(LakeError, match=r"t'@0: .*if the file was vacuumed, read a newer version"):
        old.to_arrow()
    assert pq.ParquetFile(root / lepton.table(root).files()[0].path).metadata.num_rows == 1
