"""Files are skipped only if no row of theirs can match."""

import datetime as dt
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlglot import parse_one

import lepton
from benchmarks.conformance_log import Log, column, metadata, protocol
from lepton.errors import LakeError
from lepton.lake.fields import fields_of
from lepton.lake.groups import may_match
from lepton.lake.predicate import expression_of, sql_of
from lepton.lake.skipping import Bounds, exact, from_statistics, judge

Rows = list[dict[str, Any]]
SCHEMA = pa.schema(
    {"i": pa.int32(), "f": pa.float64(), "s": pa.string(), "t": pa.timestamp("us"), "p": pa.int64()}
)
MOMENT = dt.datetime(1969, 12, 31, 23, 59, 59, 999_500)


def value(name: str) -> st.SearchStrategy[Any]:
    some: dict[str, st.SearchStrategy[Any]] = {
        "i": st.integers(-3, 3),
        "f": st.sampled_from([float("nan"), -1.5, 0.0, -0.0, 2.5, float("inf")]),
        "s": st.sampled_from(["", "a", "b", "a" * 32, "a" * 40 + "z", "ü"]),
        "t": st.integers(0, 2000).map(lambda n: MOMENT + dt.timedelta(microseconds=n)),
    }
    return st.none() | some[name]


ROW = st.fixed_dictionaries({n: value(n) for n in "ifst"})
FILE = st.tuples(st.lists(ROW, max_size=4), st.none() | st.integers(0, 2))
LEAF = st.sampled_from(
    [
        *(f"i {o} {v}" for o in ("=", "<>", "<", "<=", ">", ">=") for v in (-2, 0, 2.5)),
        *(f"f {o} {v}" for o in ("=", "<>", "<", ">=") for v in (0, 2.5, -2)),
        *(f"s {o} '{v}'" for o in ("=", "<>", "<", ">") for v in ("a", "a" * 33, "b")),
        *(f"p {o} 1" for o in ("=", "<>", "<")),
        "1 < i",
        "i IN (1, 3)",
        "s IN ('b', 'q')",
        "i BETWEEN 1 AND 2",
        "i IS NULL",
        "f IS NULL",
        "p IS NULL",
        "t > CAST('1970-01-01 00:00:00.000300' AS TIMESTAMP)",
        "t <= CAST('1969-12-31 23:59:59.999700' AS TIMESTAMP)",
        "i + 1 = 3",
    ]
)
CONDITION = st.recursive(
    LEAF,
    lambda inner: (
        inner.map(lambda c: f"NOT ({c})")
        | st.tuples(inner, inner).map(lambda c: f"({c[0]}) AND ({c[1]})")
        | st.tuples(inner, inner).map(lambda c: f"({c[0]}) OR ({c[1]})")
    ),
    max_leaves=5,
)


def statistics(values: list[Any], kind: pa.DataType) -> tuple[Any, Any, int]:
    """What writers put into the log: NaN left out, strings and timestamps cut."""
    known = [v for v in values if v is not None and v == v]
    nulls = sum(v is None for v in values)
    low, high = (min(known), max(known)) if known else (None, None)
    if pa.types.is_string(kind) and high is not None:
        low, high = low[:32], high[:32]
    if pa.types.is_timestamp(kind) and high is not None:
        low, high = (v.replace(microsecond=v.microsecond // 1000 * 1000) for v in (low, high))
    return low, high, nulls


def bounds_of(files: list[tuple[Rows, int | None]], missing: bool) -> dict[str, Bounds]:
    found: dict[str, Bounds] = {"p": exact(pa.array([p for _, p in files], pa.int64()))}
    counts = pa.array([len(r) for r, _ in files], pa.int64())
    for name in "ifst":
        kind = SCHEMA.field(name).type
        stats = [statistics([r[name] for r in rows], kind) for rows, _ in files]
        low, high = (pa.array([None if missing else s[i] for s in stats], kind) for i in (0, 1))
        nulls = pa.array([None if missing else s[2] for s in stats], pa.int64())
        found[name] = from_statistics(low, high, nulls, counts)
    return found


@settings(max_examples=250, deadline=None)
@given(files=st.lists(FILE, min_size=1, max_size=4), condition=CONDITION, missing=st.booleans())
def test_a_judgement_never_contradicts_the_rows(
    files: list[tuple[Rows, int | None]], condition: str, missing: bool
) -> None:
    expression = expression_of(condition, SCHEMA)
    truth = judge(parse_one(condition), bounds_of(files, missing), len(files))
    for n, (rows, part) in enumerate(files):
        table = pa.Table.from_pylist([{**r, "p": part} for r in rows], SCHEMA)
        true = len(table.filter(expression))
        false = len(table.filter(~expression))

        assert truth.true[n] or true == 0
        assert truth.false[n] or false == 0
        assert truth.null[n] or true + false == len(table)


def test_only_files_that_can_match_are_read(tmp_path: Path) -> None:
    for start in (0, 10, 20):
        snapshot = lepton.write(
            pa.table({"x": range(start, start + 10), "n": [None] * 5 + [1] * 5}), tmp_path / "t"
        )
    for condition in ("x = 12", pc.field("x") == 12, "x BETWEEN 11 AND 19 AND NOT x > 12"):
        chosen = snapshot.where(condition)
        assert len(chosen.files()) == 1
        assert 12 in chosen.to_arrow()["x"].to_pylist()
    for file in snapshot.where("x < 20").files():  # the log alone answers: the files are gone
        (tmp_path / "t" / file.path).unlink()
    assert snapshot.where("x < 20").count_rows() == 20
    assert snapshot.where("x >= 20").count_rows() == 10
    assert snapshot.where("x >= 25").to_arrow()["x"].to_pylist() == [25, 26, 27, 28, 29]
    assert all(len(snapshot.where("x > 99").positions(f)) == 0 for f in snapshot.files())


def test_an_expression_is_judged_only_where_its_text_means_the_same() -> None:
    assert sql_of((pc.field("i") > 2) & ~(pc.field("s") == "it's"), SCHEMA) is not None
    assert sql_of(pc.field("i").is_null(), SCHEMA) == "(i IS NULL)"
    tricky = pc.field("s") == pc.scalar('a" and invert(i > 1) or s == "')
    assert sql_of(tricky, SCHEMA) is None
    assert sql_of(pc.match_substring(pc.field("s"), "a"), SCHEMA) is None


def test_long_decimals_and_widened_doubles_have_no_bounds() -> None:
    one = pa.array([1], pa.int64())
    wide = pa.array([Decimal("1.5")], pa.decimal128(20, 2))
    bounds = from_statistics(wide, wide, one, one)
    assert bounds.low.null_count == 1
    real = pa.array([0.1])
    assert from_statistics(real, real, one, one, widened=True).high.null_count == 1


def test_an_unknown_column_is_answered_with_near_names(tmp_path: Path) -> None:
    snapshot = lepton.write(pa.table({"label": [1], "split": ["a"]}), tmp_path / "t")
    with pytest.raises(lepton.errors.LakeError, match=r"@0.*did you mean label\?"):
        snapshot.where("lable = 1")
    with pytest.raises(lepton.errors.LakeError, match=r"no column Split \(did you mean split\?\)"):
        snapshot.select(["Split"])
    with pytest.raises(lepton.errors.LakeError, match="does not fit the table"):
        snapshot.where("label = 'a'")


def test_history_and_statistics_tell_what_the_log_holds(tmp_path: Path) -> None:
    lepton.write(
        pa.table({"x": [3, 1, None], "p": list("aab")}), tmp_path / "t", partition_by=["p"]
    )
    snapshot = lepton.write(pa.table({"x": [7], "p": ["c"]}), tmp_path / "t", mode="append")
    newest, first = snapshot.history()
    table = snapshot.statistics()

    assert (newest.version, first.version) == (1, 0)
    assert newest.operation == "WRITE"
    assert newest.time is not None
    assert lepton.table(tmp_path / "t", version=0).history() == [first]
    assert table["rows"].to_pylist() == [2, 1, 1]
    assert table["partition.p"].to_pylist() == ["a", "b", "c"]
    assert [v["x"] for v in table["max"].to_pylist()] == [3, None, 7]
    assert [v["x"] for v in table["null_count"].to_pylist()] == [0, 1, 0]
    assert json.dumps(newest.metadata)


def test_row_groups_that_cannot_match_are_not_read(tmp_path: Path) -> None:
    log = Log(tmp_path / "t")
    rows = pa.table({"x": range(40), "s": [f"{n:02}" for n in range(40)]})
    add = log.add("1.parquet", rows, row_group_size=10, compression="none", use_dictionary=False)
    columns = metadata([column("x", "long"), column("s", "string"), column("later", "long")])
    log.commit(protocol(reader=1, writer=2), columns, add)
    file = tmp_path / "t" / "1.parquet"
    groups = pq.read_metadata(file)
    whole = bytearray(file.read_bytes())
    for group in (0, 2):
        start = groups.row_group(group).column(0).data_page_offset
        whole[start : start + 80] = b"\xff" * 80
    file.write_bytes(bytes(whole))
    snapshot = lepton.table(tmp_path / "t")

    with pytest.raises(LakeError, match=r"1\.parquet"):
        snapshot.to_arrow()
    for condition in ("x BETWEEN 12 AND 13 OR x > 38", "s IN ('12', '13', '39')"):
        found = snapshot.where(condition)
        assert found.to_arrow()["x"].to_pylist() == [12, 13, 39]
        assert found.read_file(snapshot.files()[0])["__position__"].to_pylist() == [12, 13, 39]
        assert found.read_file(snapshot.files()[0], start=13, stop=39).num_rows == 1
        assert found.count_rows() == 3
    assert snapshot.where("later = 1").to_arrow().num_rows == 0
    assert snapshot.where("x > 99").to_arrow().schema == snapshot.schema


def test_an_old_writer_is_not_trusted_with_the_order_of_decimals(tmp_path: Path) -> None:
    values = [Decimal(n) for n in (1, 2, 3, 4)]
    pq.write_table(pa.table({"d": pa.array(values, pa.decimal128(9, 2))}), tmp_path / "p", 2)
    (field,) = fields_of('{"fields": [{"name": "d", "type": "decimal(9,2)"}]}', "none")

    def judged() -> list[bool]:
        file = pq.ParquetFile(tmp_path / "p")
        return may_match(file.metadata, file.schema_arrow, [field], {}, ["d > 2", ""]).tolist()

    assert judged() == [False, True]
    whole = (tmp_path / "p").read_bytes()
    name = pq.read_metadata(tmp_path / "p").created_by.encode()
    other = b"parquet-mr version 1.8.1".ljust(len(name))
    (tmp_path / "p").write_bytes(whole.replace(name, other))
    assert judged() == [True, True]
