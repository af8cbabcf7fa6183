"""A Z curve keeps every row, and lets filters on any of its columns skip files."""

import datetime as dt
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lepton
from lepton.errors import LakeError
from lepton.lake import compaction
from lepton.lake.curve import curve_of
from lepton.lake.maintenance import optimize
from lepton.lake.read import unchecked_files


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=60, unique=True)
)
def test_the_curve_is_mortons(points: list[tuple[int, int]]) -> None:
    whole = sorted({(x, y) for x in range(8) for y in range(8)})
    curve = curve_of(pa.table({"x": [p[0] for p in whole], "y": [p[1] for p in whole]}))
    place = dict(zip(whole, curve.tolist(), strict=True))

    def interleaved(point: tuple[int, int]) -> int:
        return sum(
            ((point[0] >> b) & 1) << (2 * b + 1) | ((point[1] >> b) & 1) << (2 * b)
            for b in range(3)
        )

    assert sorted(points, key=lambda p: place[p]) == sorted(points, key=interleaved)


@pytest.mark.parametrize(
    "values",
    [
        [1.5, float("nan"), None, -0.0, float("-inf")],
        ["b", None, "", "é"],
        [True, None, False],
        [b"\xff", b"", None],
        [dt.date(1, 1, 1), None, dt.date(9999, 12, 31)],
        [dt.datetime(1969, 12, 31, 23, 59, 59, 999999), None],
        [Decimal("-1.10"), Decimal("99999999999999999.99"), None],
    ],
    ids=lambda v: type(v[0]).__name__,
)
def test_values_of_every_kind_have_a_place(values: list[object]) -> None:
    column = pa.array(values)
    curve = curve_of(pa.table({"x": pa.concat_arrays([column, column])}))
    assert curve[: len(values)].tolist() == curve[len(values) :].tolist()
    assert len(set(curve.tolist())) >= len({str(v) for v in values if v is not None})
    assert curve.min() >= 0


def test_more_columns_than_bits_and_nested_ones(tmp_path: Path) -> None:
    assert curve_of(pa.table({f"c{i}": [1, 0] for i in range(70)})).tolist()[1] == 0
    assert curve_of(pa.table({"x": [3, 3]})).tolist() == [0, 0]
    lepton.write(pa.table({"x": [[1]], "y": [1]}), tmp_path / "t")
    with pytest.raises(LakeError, match=r"column x is list.*no order"):
        optimize(tmp_path / "t", zorder=["x"])


@pytest.mark.parametrize("budget", [2**30, 4000])
def test_files_along_a_curve_are_skipped_by_either_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    uri = tmp_path / "t"
    rng = np.random.default_rng(0)
    for n in range(4):
        one = {"x": rng.integers(0, 10_000, 1000), "y": rng.integers(0, 10_000, 1000)}
        lepton.write(pa.table({**one, "p": [n % 2] * 1000}), uri, partition_by=["p"])
    before = lepton.table(uri).to_arrow()
    monkeypatch.setattr(compaction, "SORTED_BYTES", budget)
    done = optimize(uri, zorder=["x", "y"], target_bytes=3000)
    table = lepton.table(uri)
    order = [(n, "ascending") for n in ("x", "y", "p")]
    assert table.to_arrow().sort_by(order) == before.sort_by(order)
    assert unchecked_files(table.load()) == ()
    assert done.version == 4
    assert len(table.files()) > 12
    for column in "xy":
        assert len(table.where(f"{column} < 1000").files()) < 0.6 * len(table.files())
