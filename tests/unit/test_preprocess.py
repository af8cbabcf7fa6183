import json
import math
import pickle
import subprocess
import sys
from decimal import Decimal
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton.preprocess import Cast, Fill, MinMax, Preparation
from lepton.preprocess.statistics import BLOCK

FINITE = st.floats(-1e12, 1e12, allow_subnormal=False)
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "f": st.none() | FINITE | st.just(math.nan),
            "i": st.none() | st.integers(-(2**40), 2**40),
            "s": st.none() | st.sampled_from(["red", "green", "blue", "ünï"]),
            "v": st.lists(FINITE, min_size=3, max_size=3),
            "label": st.integers(0, 9),
        }
    ),
    min_size=1,
    max_size=30,
)
SCHEMA = pa.schema(
    [
        ("f", pa.float64()),
        ("i", pa.int64()),
        ("s", pa.string()),
        pa.field("v", pa.list_(pa.float32(), 3), metadata={"comment": "three"}),
        ("label", pa.int64()),
    ]
)
FIT = {
    "minmax": ["v", "i"],
    "standard": ["f"],
    "categories": ["s"],
    "fill": {"f": 0.5, "i": 3, "s": "none"},
}


def table_of(rows):
    return pa.Table.from_pylist(rows, SCHEMA)


def column(values, data_type=None):
    return pa.table({"x": pa.array(values, data_type)})


def prepared(preparation, table, name="x"):
    return preparation(table).column(name).to_pylist()


def cut(table, cuts):
    edges = sorted({0, len(table), *(c % (len(table) + 1) for c in cuts)})
    return [table.slice(a, b - a) for a, b in pairwise(edges)]


def bits(table):
    """Every value in full: repr keeps each bit of a float, and tells NaN and -0.0 apart."""
    return table.schema, repr(table.to_pylist())


# --- no skew -----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(ROWS, st.lists(st.integers(0, 100), max_size=4))
def test_fit_does_not_depend_on_how_rows_are_cut(rows, cuts):
    table = table_of(rows)
    whole = Preparation.fit(table, **FIT)
    parts = Preparation.fit(iter(cut(table, cuts)), **FIT)
    assert parts.fingerprint == whole.fingerprint


@settings(max_examples=40, deadline=None)
@given(ROWS, st.integers(0, 100))
def test_a_row_alone_is_prepared_as_in_its_batch_bit_for_bit(rows, at):
    table = table_of(rows)
    prepare = Preparation.fit(table, **FIT)
    at %= len(table)
    assert bits(prepare(table.slice(at, 1))) == bits(prepare(table).slice(at, 1))
    assert bits(prepare(table_of([rows[at]]))) == bits(prepare(table).slice(at, 1))


@settings(max_examples=30, deadline=None)
@given(ROWS)
def test_json_round_trip_and_schema(rows):
    table = table_of(rows)
    prepare = Preparation.fit(table, **FIT)
    again = Preparation.from_json(prepare.to_json())
    assert again == prepare
    assert again.steps == prepare.steps
    assert again.to_json() == prepare.to_json()
    assert bits(again(table)) == bits(prepare(table))
    assert prepare.schema(SCHEMA).equals(prepare(table).schema, check_metadata=True)
    assert len(prepare(table)) == len(table)


def test_requests_take_the_types_of_training():
    trained = pa.table({"x": pa.array([0.1, 0.7, 3.3], pa.float32()), "n": pa.array([1, 2, 3])})
    prepare = Preparation.fit(trained, standard=["x"], fill={"x": "mean"}, minmax=["n"])
    request = pa.Table.from_pylist([{"x": 0.7, "n": 2.0}])  # JSON numbers: float64
    assert request.schema.field("x").type == pa.float64()
    assert bits(prepare(request)) == bits(prepare(trained).slice(1, 1))
    empty = pa.Table.from_pylist([{"x": None, "n": 2}])
    assert prepare(empty).schema == prepare(trained).schema
    assert abs(prepared(prepare, empty)[0]) < 1e-6


def test_blocks_longer_than_the_running_sum_are_cut_alike():
    values = np.random.default_rng(0).normal(1e6, 1, BLOCK * 2 + 17)
    table = column(values)
    whole = Preparation.fit(table, standard=["x"])
    parts = Preparation.fit(
        pa.RecordBatchReader.from_batches(table.schema, table.to_batches(max_chunksize=10_007)),
        standard=["x"],
    )
    assert parts == whole
    (_, step) = whole.steps
    assert step.mean == pytest.approx(values.mean(), rel=1e-14)
    assert step.std == pytest.approx(values.std(), rel=1e-9)


# --- scaling -----------------------------------------------------------------------------------


def test_minmax_scales_to_float32_and_clips_only_when_asked():
    step = MinMax(column="x", low=10, high=20)
    out = step(column([10, 15, 20, 30, None]))
    assert out.schema.field("x").type == pa.float32()
    assert out["x"].to_pylist() == [0.0, 0.5, 1.0, 2.0, None]
    clipped = MinMax(column="x", low=10, high=20, clip=True)
    assert prepared(clipped, column([5, 15, 30])) == [0.0, 0.5, 1.0]
    assert Preparation.fit(column([1, 2]), minmax=["x"], clip=True).steps[-1].clip


def test_constant_columns_become_zero():
    table = column([0.1] * 7 + [None])
    for name in ("minmax", "standard"):
        prepare = Preparation.fit(table, **{name: ["x"]})
        assert prepared(prepare, table) == [0.0] * 7 + [None]
        assert prepared(prepare, column([5.0])) == [0.0]


def test_nan_stays_nan_without_fill():
    out = prepared(Preparation.fit(column([0.0, 2.0, math.nan]), minmax=["x"]), column([math.nan]))
    assert math.isnan(out[0])


def test_fixed_lists_and_tensors_are_scaled_elementwise_with_one_pair():
    listed = column([[0, 50], None, [100, 25]], pa.list_(pa.uint8(), 2))
    prepare = Preparation.fit(listed, minmax=["x"])
    assert prepared(prepare, listed) == [[0.0, 0.5], None, [1.0, 0.25]]
    assert prepared(prepare, listed.slice(1)) == [None, [1.0, 0.25]]
    tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(
        np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
    )
    table = pa.table({"x": tensor}).slice(1, 2)
    prepare = Preparation.fit(table, minmax=["x"])
    out = prepare(table)
    assert out.schema.field("x").type == pa.fixed_shape_tensor(pa.float32(), (2, 3))
    got = out["x"].combine_chunks().to_numpy_ndarray()
    assert np.array_equal(got, ((np.arange(6, 18) - 6) / 11).astype(np.float32).reshape(2, 2, 3))
    assert prepare.schema(table.schema) == out.schema


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list])
def test_lists_of_any_length_keep_lengths_and_nulls(kind):
    rows = [[9], [0, None, 4], None, [], [8]]
    table = column(rows, kind(pa.float64())).slice(1)
    prepare = Preparation.fit(table, minmax=["x"])
    assert prepared(prepare, table) == [[0.0, None, 0.5], None, [], [1.0]]
    assert prepare(table.slice(0, 0)).schema == prepare.schema(table.schema)
    nested = column([[[0, 2], [4]], []], pa.list_(kind(pa.int16())))
    assert prepared(Preparation.fit(nested, minmax=["x"]), nested) == [[[0.0, 0.5], [1.0]], []]


def test_decimals_and_dictionaries_are_read_as_what_they_stand_for():
    money = column([Decimal("1.5"), Decimal("2.5")], pa.decimal128(8, 2))
    assert prepared(Preparation.fit(money, minmax=["x"]), money) == [0.0, 1.0]
    coded = pa.table({"x": pa.array(["b", "a"]).dictionary_encode()})
    prepare = Preparation.fit(coded, categories=["x"])
    assert prepared(prepare, coded) == prepared(prepare, column(["b", "a"])) == [1, 0]
    assert prepare(coded).schema == prepare.schema(coded.schema)


# --- filling and categories --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "value"), [("mean", 2.25), ("median", 1.5), ("most_frequent", 1.0), (9.0, 9.0), (7, 7)]
)
def test_fill_rules_on_numbers(rule, value):
    table = column([1.0, None, 1.0, math.nan, 5.0, 2.0])
    prepare = Preparation.fit(table, fill={"x": rule})
    assert prepared(prepare, table) == [1.0, value, 1.0, value, 5.0, 2.0]


@pytest.mark.parametrize("data_type", [pa.float16(), pa.float32(), pa.int8(), pa.uint64()])
def test_fill_takes_every_numeric_type(data_type):
    table = column([1, None, 3], data_type)
    out = Preparation.fit(table, fill={"x": 2})(table)
    assert out["x"].to_pylist() == [1, 2, 3]
    assert out.schema == table.schema


def test_integers_filled_with_a_mean_become_float64():
    table = column([1, None, 2])
    prepare = Preparation.fit(table, fill={"x": "mean"})
    assert prepare(table).schema == prepare.schema(table.schema) == pa.schema({"x": pa.float64()})
    assert prepared(prepare, table) == [1.0, 1.5, 2.0]
    kept = Preparation.fit(table, fill={"x": "most_frequent"})
    assert kept(table)["x"].to_pylist() == [1, 1, 2]


@pytest.mark.parametrize(("values", "rule"), [(["b", None, "a", "b"], "b"), ([True, None], True)])
def test_most_frequent_of_strings_and_booleans(values, rule):
    table = column(values)
    out = prepared(Preparation.fit(table, fill={"x": "most_frequent"}), table)
    assert out == [rule if v is None else v for v in values]


def test_scaling_is_fitted_on_filled_values():
    table = column([1.0, None, 3.0, None])
    (_, _, low_high) = Preparation.fit(table, fill={"x": -5.0}, minmax=["x"]).steps
    assert (low_high.low, low_high.high) == (-5.0, 3.0)
    (_, _, scaled) = Preparation.fit(table, fill={"x": "mean"}, standard=["x"]).steps
    assert (scaled.mean, scaled.std) == (2.0, pytest.approx(np.std([1, 2, 3, 2])))
    empty = column([None, None], pa.float32())
    assert prepared(Preparation.fit(empty, fill={"x": 4}, minmax=["x"]), empty) == [0.0, 0.0]


def test_categories_are_sorted_codes_and_the_rest_is_one_code_more():
    prepare = Preparation.fit(column(["b", "a", None, "b"]), categories=["x"])
    assert prepare.steps[-1].values == ("a", "b")
    out = prepare(column(["a", "b", "c", None]))
    assert out["x"].to_pylist() == [0, 1, 2, 2]
    assert out.schema.field("x").type == pa.int64()
    numbers = Preparation.fit(column([30, 10], pa.int16()), categories=["x"])
    assert prepared(numbers, column([10, 30, 20, None])) == [0, 1, 2, 2]
    filled = Preparation.fit(column(["b", None]), categories=["x"], fill={"x": "none"})
    assert filled.steps[-1].values == ("b", "none")


def test_cast_is_checked():
    assert prepared(Cast(column="x", type=pa.int32()), column([1.0, None])) == [1, None]
    with pytest.raises(ValueError, match=r"'x'.*cannot be cast to int8"):
        Cast(column="x", type=pa.int8())(column([1000]))
    with pytest.raises(ValueError, match="names no plain"):
        Cast(column="x", type=pa.struct([("a", pa.int8())]))


# --- the preparation as a whole ----------------------------------------------------------------


def test_other_columns_order_and_comments_stay():
    table = table_of([{"f": 1.0, "i": 2, "s": "a", "v": [1, 2, 3], "label": 4}])
    out = Preparation.fit(table, minmax=["v"])(table)
    assert out.column_names == table.column_names
    assert out.schema.field("v").metadata == {b"comment": b"three"}
    assert out.select(["f", "i", "s", "label"]) == table.select(["f", "i", "s", "label"])


def test_missing_columns_are_listed_and_only_keeps_the_rest():
    table = pa.table({"x": [1.0, 2.0], "label": ["a", "b"]})
    prepare = Preparation.fit(table, minmax=["x"], categories=["label"])
    assert prepare.columns == ("x", "label")
    with pytest.raises(ValueError, match=r"needs the columns \['x', 'label'\].*\['x'\]"):
        prepare(table.select(["x"]))
    with pytest.raises(ValueError, match="'label'"):
        prepare.schema(pa.schema({"x": pa.float64()}))
    replica = prepare.only(["x", "other"])
    assert replica.columns == ("x",)
    assert replica(table.select(["x"])) == prepare(table).select(["x"])
    with pytest.raises(TypeError, match="one string"):
        prepare.only("x")


def test_no_steps_leave_a_table_alone_and_read_nothing():
    prepare = Preparation.fit(iter([]))
    assert prepare == Preparation()
    assert prepare(column([1])) == column([1])
    assert prepare.schema(SCHEMA) == SCHEMA


def test_equality_hash_pickle_and_fingerprint_follow_the_json():
    a = Preparation((Fill(column="x", value=1),))
    assert a != Preparation((Fill(column="x", value=1.0),))
    assert a != Preparation((Fill(column="x", value=True),))
    b = Preparation.fit(column([0.1, 0.2]), standard=["x"], fill={"x": "median"})
    assert pickle.loads(pickle.dumps(b)) == b
    assert len({a, b, Preparation.from_json(b.to_json())}) == 2
    assert len(b.fingerprint) == 64
    assert a.fingerprint != b.fingerprint


def test_snapshots_are_read_by_the_columns_needed():
    class Lake:
        def __init__(self, table):
            self.table = table

        schema = property(lambda self: self.table.schema)

        def select(self, columns):
            return Lake(self.table.select(columns))

        def batches(self):
            assert self.table.column_names == ["x"]
            return iter([self.table.slice(0, 1), self.table.slice(1)])

        def to_arrow(self):
            raise AssertionError("batches will do")

    class Whole:
        def to_arrow(self):
            return table

    table = pa.table({"x": [1.0, 2.0, 3.0], "big": ["…"] * 3})
    expected = Preparation.fit(table, minmax=["x"])
    assert Preparation.fit(Lake(table), minmax=["x"]) == expected
    assert Preparation.fit(Whole(), minmax=["x"]) == expected
    assert Preparation.fit(table.to_batches()[0], minmax=["x"]) == expected
    with pytest.raises(ValueError, match="needs the columns"):
        Preparation.fit(Lake(table), minmax=["y"])


def test_the_json_is_plain_and_versioned():
    prepare = Preparation(
        (Cast(column="x", type=pa.float32()), MinMax(column="x", low=0.1, high=1))
    )
    assert json.loads(prepare.to_json()) == {
        "v": 1,
        "steps": [
            {"step": "cast", "column": "x", "type": "float"},
            {"step": "minmax", "column": "x", "low": 0.1, "high": 1.0, "clip": False},
        ],
    }


def test_importing_loads_neither_ray_nor_torch():
    code = "import sys, lepton.preprocess; print({'ray', 'torch'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
