import os
import subprocess
import sys

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton.preprocess import assign_split


def sides(keys, data_type=None, **options):
    return assign_split(pa.table({"id": pa.array(keys, data_type)}), key="id", **options)[
        options.get("column", "split")
    ].to_pylist()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=8), min_size=1, max_size=20), st.randoms(), st.integers(0, 20))
def test_a_key_has_one_side_whatever_stands_around_it(keys, random, at):
    whole = dict(zip(keys, sides(keys, pa.string()), strict=True))
    shuffled = random.sample(keys, len(keys))
    assert sides(shuffled, pa.string()) == [whole[k] for k in shuffled]
    cut = pa.concat_tables(
        [
            pa.table({"id": pa.array(keys[:at], pa.string())}),
            pa.table({"id": pa.array(keys[at:], pa.string())}),
        ]
    )
    assert assign_split(cut, key="id")["split"].to_pylist() == [whole[k] for k in keys]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_only_moves_keys_to_train(keys, a, b):
    small, large = (sides(keys, pa.int64(), train=t) for t in sorted((a, b)))
    moves = set(zip(small, large, strict=True))
    assert ("train", "test") not in moves


def test_the_hash_is_the_documented_one():
    # BLAKE2b-8 of "\0" + key: a change here would move rows from test to train in old tables
    assert sides(list(range(12))) == sides([str(i) for i in range(12)])
    assert "".join(side[1] for side in sides(list(range(12)))) == "rrrrrerrrrrr"


def test_shares_come_out_about_right_and_salts_differ():
    keys = list(range(20_000))
    first, second = sides(keys), sides(keys, salt="b")
    assert abs(first.count("train") / 20_000 - 0.8) < 0.01
    assert abs(second.count("train") / 20_000 - 0.8) < 0.01
    both = sum(a == b == "test" for a, b in zip(first, second, strict=True))
    assert abs(both / 20_000 - 0.04) < 0.01
    assert set(sides(keys[:100], train=1.0)) == {"train"}
    assert set(sides(keys[:100], train=0.0)) == {"test"}


def test_integer_width_and_encoding_of_strings_do_not_matter():
    keys = [3, 7, 3, 100]
    for data_type in (pa.int8(), pa.uint64(), pa.int32()):
        assert sides(keys, data_type) == sides(keys)
    words = ["a", "b", "a", "ü"]
    for data_type in (pa.large_string(), pa.dictionary(pa.int8(), pa.string())):
        assert sides(words, data_type) == sides(words)


def test_another_process_with_another_hash_seed_agrees():
    code = (
        "import pyarrow as pa; from lepton.preprocess import assign_split;"
        "t = pa.table({'id': [f'k{i}' for i in range(50)]});"
        "print(','.join(assign_split(t, key='id')['split'].to_pylist()))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "77"},
    )
    assert out.stdout.strip().split(",") == sides([f"k{i}" for i in range(50)])


def test_rows_and_columns_stay_and_the_new_one_is_last():
    table = pa.table({"id": [5, 6, 5], "x": [1.0, 2.0, 3.0]})
    out = assign_split(table, key="id", column="part")
    assert out.column_names == ["id", "x", "part"]
    assert out.select(["id", "x"]) == table
    assert out.schema.field("part").type == pa.string()
    assert out["part"][0] == out["part"][2]
    empty = assign_split(table.slice(0, 0), key="id")
    assert empty.schema.field("split").type == pa.string()
    assert not len(empty)


@pytest.mark.parametrize(
    ("keys", "options", "message"),
    [
        ([1], {"key": "no"}, r"key column 'no'.*\['id'\]"),
        ([1], {"train": 1.5}, "between 0 and 1"),
        ([1], {"train": float("nan")}, "between 0 and 1"),
        ([1, None], {}, "1 nulls"),
        ([1.0], {}, "'id' is double"),
        ([1], {"column": "id"}, "already has a column 'id'"),
    ],
)
def test_what_cannot_be_split_is_refused(keys, options, message):
    with pytest.raises(ValueError, match=message):
        assign_split(pa.table({"id": keys}), **{"key": "id"} | options)
