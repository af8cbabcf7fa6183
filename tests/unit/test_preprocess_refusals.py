"""What cannot be prepared is refused, with the column it is about."""

import math

import pyarrow as pa
import pytest

from lepton.preprocess import Categories, Fill, MinMax, Preparation, Standard


def column(values, data_type=None):
    return pa.table({"x": pa.array(values, data_type)})


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (column([1.0]), {"minmax": ["y"]}, r"needs the columns \['y'\].*\['x'\]"),
        (column([], pa.float64()), {"minmax": ["x"]}, "no rows"),
        (column([None], pa.float64()), {"minmax": ["x"]}, "'x' has no values.*fill"),
        (column([None]), {"standard": ["x"]}, "'x' has no values.*fill"),
        (column([math.nan]), {"fill": {"x": "mean"}}, "'x' has no values to take a mean"),
        (column([None], pa.string()), {"fill": {"x": "most_frequent"}}, "'x' has no values"),
        (column([None], pa.string()), {"categories": ["x"]}, "'x' has no values"),
        (column(["a"]), {"minmax": ["x"]}, "'x' is string.*cast"),
        (column([["a"]]), {"standard": ["x"]}, "'x' is list<.*cannot be scaled"),
        (column([True]), {"minmax": ["x"]}, "'x' is bool.*cast"),
        (column([1.0, math.inf]), {"minmax": ["x"]}, "'x' has infinite values"),
        (column([-1.7e308, 1.7e308]), {"minmax": ["x"]}, "'x'.*finite distance"),
        (column([-1.7e308, 1.7e308]), {"standard": ["x"]}, "'x': std must be finite"),
        (column([1.0]), {"categories": ["x"]}, "'x' is double.*categories"),
        (column(["a"]), {"fill": {"x": "median"}}, "'x' is string and has no median"),
        (column(["a"]), {"fill": {"x": 1}}, "'x' is string.*cannot be filled with 1"),
        (column([1]), {"fill": {"x": "a"}}, "'x' is int64.*cannot be filled"),
        (column([1]), {"fill": {"x": True}}, "'x' is int64.*cannot be filled"),
        (column([1], pa.int8()), {"fill": {"x": 300}}, "300 does not fit column 'x'"),
        (column([[1.0]]), {"fill": {"x": "mean"}}, "scalar columns only"),
        (column([1]), {"fill": {"x": "mean"}, "categories": ["x"]}, "a mean is not"),
        (column([1], pa.date32()), {"fill": {"x": "most_frequent"}}, "numbers, strings, booleans"),
        (column([1]), {"minmax": ["x"], "standard": ["x"]}, "more than once"),
        ([], {"minmax": ["x"]}, "no data"),
        ([column([1]), column([1.0])], {"minmax": ["x"]}, "type of \\['x'\\] changes"),
    ],
)
def test_fit_says_what_is_wrong_with_which_column(table, options, message):
    with pytest.raises(ValueError, match=message):
        Preparation.fit(table, **options)


def test_fit_refuses_wrong_kinds_of_arguments():
    with pytest.raises(TypeError, match="sequence of column names"):
        Preparation.fit(column([1]), minmax="x")
    with pytest.raises(TypeError, match="cannot fit on a dict"):
        Preparation.fit([{"x": 1}], minmax=["x"])
    with pytest.raises(TypeError, match="not a preparation step"):
        Preparation(("minmax",))


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: MinMax(column="x", low=2, high=1), ValueError),
        (lambda: MinMax(column="x", low="0", high=1), TypeError),
        (lambda: MinMax(column="x", low=0, high=1, clip=1), TypeError),
        (lambda: Standard(column="x", mean=math.nan, std=1), ValueError),
        (lambda: Standard(column="x", mean=0, std=-1), ValueError),
        (lambda: Fill(column="x", value=math.inf), ValueError),
        (lambda: Fill(column="x", value=None), TypeError),
        (lambda: Categories(column="x", values=()), ValueError),
        (lambda: Categories(column="x", values="ab"), TypeError),
        (lambda: Categories(column="x", values=("a", 1)), ValueError),
        (lambda: Categories(column="x", values=("a", "a")), ValueError),
        (lambda: Categories(column="x", values=(2**63,)), ValueError),
    ],
)
def test_steps_check_their_parameters(make, error):
    with pytest.raises(error, match="'x'"):
        make()


def test_steps_refuse_columns_of_other_kinds():
    with pytest.raises(ValueError, match="'x' is int64, but its categories are strings"):
        Categories(column="x", values=("a",))(column([1]))
    with pytest.raises(ValueError, match="'x' is string, which cannot be scaled"):
        Standard(column="x", mean=0, std=1)(column(["a"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "version"),
        ('{"v":2,"steps":[]}', "version 2.*reads version 1"),
        ('{"v":true,"steps":[]}', "version True"),
        ('{"v":1}', "steps"),
        ('{"v":1,"steps":[1]}', "1 is not a step"),
        ('{"v":1,"steps":[{"step":"log","column":"x"}]}', "'log'.*does not know"),
        ('{"v":1,"steps":[{"step":"cast","column":"x"}]}', "cast step has"),
        ('{"v":1,"steps":[{"step":"cast","column":1,"type":"float"}]}', "no column name"),
        ('{"v":1,"steps":[{"step":"cast","column":"x","type":"blob"}]}', "'blob' names no plain"),
        ('{"v":1,"steps":[{"step":"fill","column":"x","value":NaN}]}', "has a NaN"),
        ('{"v":1,"steps":[{"step":"fill","column":"x","value":1e999}]}', "finite"),
        ('{"v":1,"steps":[{"step":"fill","column":"x","value":[1]}]}', "cannot be read.*list"),
        ('{"v":1,"steps":[{"step":"categories","column":"x","values":[[1]]}]}', "all str or all"),
    ],
)
def test_json_that_is_not_a_preparation_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Preparation.from_json(text)
