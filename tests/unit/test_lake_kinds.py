"""Arrow's types in a new table: the same values, or a refusal that says what to do."""

import datetime as dt
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import lepton
from lepton.errors import LakeError

NOON = dt.datetime(2024, 5, 6, 12, 0, 0, 250, dt.UTC)
KEPT: list[tuple[str, Any, Any]] = [
    ("unsigned", pa.array([0, 255], pa.uint8()), pa.int16()),
    ("unsigned 32", pa.array([0, 2**32 - 1], pa.uint32()), pa.int64()),
    ("half", pa.array([1.5, -0.25]).cast(pa.float16()), pa.float32()),
    ("Berlin", pa.array([NOON], pa.timestamp("us", tz="Europe/Berlin")), pa.timestamp("us", "UTC")),
    ("nanoseconds", pa.array([1_000_000_001_000], pa.timestamp("ns")), pa.timestamp("us")),
    ("seconds", pa.array([1_700_000_000], pa.timestamp("s")), pa.timestamp("us")),
    ("categories", pa.array(["a", "b", "a"]).dictionary_encode(), pa.string()),
    ("bytes", pa.array([[1, 255], None], pa.list_(pa.uint8())), pa.list_(pa.int16())),
    (
        "record",
        pa.array([{"n": 7}], pa.struct([("n", pa.uint16())])),
        pa.struct([("n", pa.int32())]),
    ),
]


@pytest.mark.parametrize(("name", "column", "kind"), KEPT, ids=[k[0] for k in KEPT])
def test_values_stay_the_same(tmp_path: Path, name: str, column: Any, kind: Any) -> None:
    found = lepton.write(pa.table({name: column}), tmp_path / "t").to_arrow()[name]

    assert found.type.equals(kind) or found.to_pylist() == column.cast(kind).to_pylist()
    plain = found.to_pylist()
    assert plain == [v.astimezone(dt.UTC) if name == "Berlin" else v for v in column.to_pylist()]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([dt.time(1, 2)], pa.time64("us")),
        pa.array([dt.timedelta(1)], pa.duration("us")),
        pa.nulls(1),
        pa.array([None], pa.decimal256(40, 2)),
    ],
    ids=str,
)
def test_what_delta_has_no_type_for_is_refused_by_name(tmp_path: Path, column: Any) -> None:
    with pytest.raises(LakeError, match=r"column x is .*, which Delta has no type for"):
        lepton.write(pa.table({"x": column}), tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_values_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    large = pa.table({"x": pa.array([2**63], pa.uint64())})
    with pytest.raises(LakeError, match="column x is int64"):
        lepton.write(large, tmp_path / "t")
    fine = pa.table({"x": pa.array([1], pa.timestamp("ns"))})
    with pytest.raises(LakeError, match="column x is timestamp"):
        lepton.write(fine, tmp_path / "u")


NESTED = pa.list_(pa.struct({"m": pa.map_(pa.string(), pa.float32())}))


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (pa.decimal128(5, 1), pa.array([1.25])),
        (pa.float32(), pa.array([0.1])),
        (pa.struct({"x": pa.float32()}), pa.array([None, {"x": 0.1}])),
        (
            NESTED,
            pa.array(
                [[{"m": [("k", 0.5), ("l", 0.1)]}, None]],
                pa.list_(pa.struct({"m": pa.map_(pa.string(), pa.float64())})),
            ),
        ),
        (pa.decimal128(5, 1), pa.array([float("nan")])),
    ],
)
def test_no_value_is_rounded_on_its_way_into_a_column(
    tmp_path: Path, kind: Any, given: Any
) -> None:
    lepton.write(pa.table({"x": pa.array([], kind)}), tmp_path / "t")
    with pytest.raises(LakeError, match=r"column x.*(exactly|decimal|Decimal)"):
        lepton.write(pa.table({"x": given}), tmp_path / "t")
    assert lepton.table(tmp_path / "t").version == 0


def test_floats_that_fit_go_in_nested_too(tmp_path: Path) -> None:
    lepton.write(pa.table({"x": pa.array([], pa.list_(pa.float32()))}), tmp_path / "t")
    values = [[0.5, None, float("inf")], None, [], [float("nan")]]
    table = lepton.write(pa.table({"x": pa.array(values, pa.list_(pa.float64()))}), tmp_path / "t")
    assert repr(table.to_arrow()["x"].to_pylist()) == repr(values)


@pytest.mark.parametrize(
    ("rows", "how", "told"),
    [
        (pa.table({"p": [1, 2]}), {"partition_by": ["p"]}, "every column is a partition column"),
        (pa.table([[1], [2]], names=["a", "A"]), {}, "a and A are one to Delta"),
        (pa.table({"g": pa.array([{"a": 1, "A": 2}])}), {}, "fields of column g: a and A are one"),
        (pa.table({"s": pa.array([b"\xff"]).view(pa.string())}), {}, "column s has what is no str"),
        (pa.table({"__position__": [1]}), {}, "lepton needs for itself"),
        (pa.table({"d": pa.array([100], pa.decimal128(5, -2))}), {}, "no type for"),
    ],
)
def test_a_table_that_cannot_be_is_not_made(
    tmp_path: Path, rows: pa.Table, how: dict[str, Any], told: str
) -> None:
    with pytest.raises(LakeError, match=told):
        lepton.write(rows, tmp_path / "t", **how)
    assert not (tmp_path / "t" / "_delta_log").exists()
