"""A dictionary is written where values come again, and nowhere else."""

import datetime as dt
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lepton
from lepton.lake.encoding import STRETCH, STRETCHES, repeating
from lepton.lake.read import unchecked_files

MANY = 3 * STRETCH * STRETCHES
MOMENT = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)


def encoded(uri: Path) -> dict[str, bool]:
    """Whether each column of a table's only file has a dictionary, by its path."""
    (file,) = uri.glob("*.parquet")
    group = pq.ParquetFile(file).metadata.row_group(0)
    chunks = [group.column(c) for c in range(group.num_columns)]
    return {c.path_in_schema: bool(c.has_dictionary_page) for c in chunks}


def test_values_that_come_again_have_a_dictionary_and_others_none(tmp_path: Path) -> None:
    chance = np.random.default_rng(3)
    numbers = np.arange(MANY)
    lists = pa.ListArray.from_arrays(
        pa.array(np.arange(MANY + 1) * 2), chance.normal(size=2 * MANY)
    )
    rows = pa.table(
        {
            "measured": chance.normal(size=MANY),
            "rounded": numbers % 50 / 4,
            "id": numbers,
            "sorted": numbers // 100,
            "kind": pa.array([f"kind {n % 9}" for n in numbers]),
            "name": pa.array([f"name {n}" for n in numbers]),
            "vector": lists,
            "group": pa.StructArray.from_arrays(
                [pa.array(numbers % 3), pa.array(numbers * 0.1)], ["few", "many"]
            ),
        }
    )
    lepton.write(rows, tmp_path / "t")

    assert encoded(tmp_path / "t") == {
        "measured": False,
        "rounded": True,
        "id": False,
        "sorted": True,
        "kind": True,
        "name": False,
        "vector.list.element": False,
        "group.few": True,
        "group.many": False,
    }
    snapshot = lepton.table(tmp_path / "t")
    assert snapshot.to_arrow().equals(rows.cast(snapshot.schema))
    assert unchecked_files(snapshot.load()) == ()


VALUES: list[tuple[str, pa.DataType, Callable[[int], Any]]] = [
    ("decimal", pa.decimal128(38, 2), lambda n: Decimal(n) / 100),
    ("bytes", pa.binary(), lambda n: b"%d" % n),
    ("time", pa.timestamp("us", "UTC"), lambda n: MOMENT + dt.timedelta(seconds=n)),
    ("date", pa.date32(), lambda n: dt.date(2000, 1, 1) + dt.timedelta(days=n)),
    ("byte", pa.int8(), lambda n: n),
    ("float", pa.float32(), lambda n: n / 2),
]


@pytest.mark.parametrize(("name", "kind", "value"), VALUES, ids=[v[0] for v in VALUES])
def test_every_kind_of_value_is_judged_nulls_and_maps_too(
    name: str, kind: pa.DataType, value: Callable[[int], Any]
) -> None:
    del name
    other = pa.array([value(n) for n in range(60)], kind)
    same = pa.array([value(n % 3) if n % 2 else None for n in range(60)], kind)
    map_of: Any = pa.map_
    maps = pa.array([[(n % 3, value(n))] for n in range(60)], map_of(pa.int64(), kind))

    assert repeating(pa.table({"other": other, "same": same})) == ["same"]
    assert repeating(pa.table({"map": maps.slice(30)})) == ["map.key_value.key"]
    assert repeating(pa.table({"none": pa.nulls(9, kind)})) == ["none"]
    assert repeating(pa.table({"a.b": same})) == ["a.b"]


def test_a_dot_in_a_name_is_not_taken_for_a_member(tmp_path: Path) -> None:
    inside = pa.StructArray.from_arrays([pa.array([n / 3 for n in range(60)])], ["b"])
    rows = pa.table({"a.b": ["same"] * 60, "a": inside})

    assert lepton.write(rows, tmp_path / "t").to_arrow().to_pylist() == rows.to_pylist()
    assert repeating(rows) == ["a.b"]
