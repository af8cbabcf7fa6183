"""Row filters: what SQL would keep, exactly, or a refusal that says why."""

import datetime as dt
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lepton
from lepton.errors import LakeError
from lepton.lake.predicate import expression_of

NAN, INF = float("nan"), float("inf")
BIG = 2**53
ROWS = pa.table(
    {
        "id": pa.array(range(6), pa.int64()),
        "tiny": pa.array([127, -128, 0, None, 1, 3], pa.int8()),
        "big": pa.array([2**63 - 1, -(2**63), None, BIG + 1, BIG, 0], pa.int64()),
        "f": pa.array([NAN, 0.0, -0.0, None, 1.5, INF]),
        "narrow": pa.array([0.1, 0.5, None, NAN, -0.0, 2.0], pa.float32()),
        "d": pa.array([Decimal("0.30"), None] * 3, pa.decimal128(10, 2)),
        "s": pa.array(["a", "", None, "it's", "ü", "a"]),
        "t": pa.array([dt.datetime(2020, 1, 1, 0, 0, 0, 5, dt.UTC)] * 6, pa.timestamp("us", "UTC")),
        "a.b": pa.array(range(6), pa.int64()),
        "a": pa.array([{"b": n + 0.5} for n in range(6)]),
    }
)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> lepton.Snapshot:
    return lepton.write(ROWS, tmp_path_factory.mktemp("filters") / "t")


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ("s NOT IN ('a', 'q')", [1, 3, 4]),
        ("NOT (tiny IN (1, 300))", [0, 1, 2, 5]),
        ("d NOT IN (0.3)", []),
        ("f IN (0)", [1, 2]),
        ("f NOT IN (0)", [0, 4, 5]),
        ("narrow IN (0.1, 0.5)", [1]),
        ("narrow = 0.1 OR narrow IN (2)", [5]),
        ("id IN (1.0, 2.5)", [1]),
        ("big > 9007199254740992.0", [0, 3]),
        ("big = 9007199254740993.0", [3]),
        ("big < 1e30 AND big > -99999999999999999999", [0, 1, 3, 4, 5]),
        ("big >= 0.5", [0, 3, 4]),
        ("tiny + 1 = 128", [0]),
        ("tiny * 2 = -256", [1]),
        ("tiny / 2 = 1.5", [5]),
        ("1 / tiny > 0.5", [4]),
        ("id * 0.1 > 0.3", [3, 4, 5]),
        ("d + 1 = 1.3 AND d / 2 = 0.15", [0, 2, 4]),
        ("d < 1" + "0" * 60, [0, 2, 4]),
        ('"a.b" = 2', [2]),
        ("a.b = 2.5", [2]),
        ("t = '2020-01-01 02:00:00.000005+02:00'", [0, 1, 2, 3, 4, 5]),
        (" OR ".join(f"id = {n}" for n in range(100, 200)), []),
    ],
)
def test_a_filter_keeps_what_sql_would(
    table: lepton.Snapshot, condition: str, kept: list[int]
) -> None:
    found = table.where(condition)
    assert found.to_arrow()["id"].to_pylist() == kept
    assert found.count_rows() == len(kept)


@pytest.mark.parametrize(
    ("condition", "told"),
    [
        ("t > '2020-01-01 00:00:00.0000001'", "finer than a microsecond"),
        ("id = CAST('1' AS INT)", "needs a constant"),
        (" OR ".join(["id = 1"] * 3000), "too deep"),
    ],
)
def test_a_filter_that_cannot_be_exact_is_refused(
    table: lepton.Snapshot, condition: str, told: str
) -> None:
    with pytest.raises(LakeError, match=told) as refused:
        table.where(condition)
    assert str(table) in str(refused.value)


@pytest.mark.parametrize("condition", ["big + 1 > 0", pc.field("id") / pc.field("tiny") > 0])
def test_what_a_value_is_too_much_for_names_the_file(
    table: lepton.Snapshot, condition: Any
) -> None:
    with pytest.raises(LakeError, match=r"@0: the filter .* for file 'part-.*(overflow|zero)"):
        table.where(condition).to_arrow()


NUMBERS = st.integers(-(2**65), 2**65) | st.sampled_from([BIG, BIG + 1, 2**63, -(2**63) - 1])


@settings(max_examples=150, deadline=None)
@given(
    value=st.integers(-(2**63), 2**63 - 1) | st.integers(BIG - 2, BIG + 2),
    literal=NUMBERS | st.decimals(-(2**64), 2**64, places=2, allow_nan=False),
    operator=st.sampled_from(["=", "<>", "<", "<=", ">", ">="]),
)
def test_an_integer_compares_with_any_number_exactly(
    value: int, literal: int | Decimal, operator: str
) -> None:
    rows = pa.table({"i": pa.array([value], pa.int64())})
    other = Decimal(literal)
    right = {
        "=": value == other,
        "<>": value != other,
        "<": value < other,
        "<=": value <= other,
        ">": value > other,
        ">=": value >= other,
    }
    kept = rows.filter(expression_of(f"i {operator} {literal}", rows.schema))
    assert len(kept) == right[operator]
