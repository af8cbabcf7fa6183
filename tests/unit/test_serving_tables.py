"""Arrow IPC streams in and out."""

import contextlib
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lepton.serving.inputs import BadRequest, input_of
from lepton.serving.tables import rows_of_stream, stream_of

INPUTS = (input_of("x", "float", (2,)), input_of("k", "int64", (), nullable=True))


def stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


def table_of(x: Any, k: Any = (1, None)) -> pa.Table:
    return pa.table({"k": pa.array(k, pa.int64()), "x": x})


LISTS = [[1.0, 2.0], [3.0, 4.0]]
TENSOR = pa.FixedShapeTensorArray.from_numpy_ndarray(np.array(LISTS, np.float32))


@pytest.mark.parametrize(
    "x",
    [
        pa.array(LISTS, pa.list_(pa.float32())),
        pa.array(LISTS, pa.large_list(pa.float32())),
        pa.array(LISTS, pa.list_(pa.float32(), 2)),
        TENSOR,
    ],
)
def test_every_form_of_a_column_is_the_same_rows(x: Any) -> None:
    rows = rows_of_stream(stream(table_of(x)), INPUTS)

    assert rows.to_pylist() == [{"x": [1.0, 2.0], "k": 1}, {"x": [3.0, 4.0], "k": None}]


def test_tensors_of_more_dimensions_and_texts() -> None:
    inputs = (input_of("x", "float", (2, 3)), input_of("t", "string", ()))
    values = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    nested = pa.array(values.tolist(), pa.list_(pa.list_(pa.float32())))
    for x in (pa.FixedShapeTensorArray.from_numpy_ndarray(values), nested):
        table = pa.table({"x": x, "t": pa.array(["a", "b"], pa.large_string())})
        rows = rows_of_stream(stream(table), inputs)
        assert rows["x"].to_pylist() == values.reshape(2, 6).tolist()
        assert rows["t"].to_pylist() == ["a", "b"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"x": [[1.0]]}), "columns are"),
        (table_of(pa.array([[1.0], [2.0]], pa.list_(pa.float32()))), "shape .1., wanted .2."),
        (table_of(pa.array([[1.0], [2.0, 3]], pa.list_(pa.float32()))), "lists of 1 to 2"),
        (table_of(pa.array([[1.0, 2], None], pa.list_(pa.float32()))), "a whole list is null"),
        (table_of(pa.array(LISTS)), "holds double, wanted float"),
        (table_of(pa.array([[1, np.nan], [1, 2]], pa.list_(pa.float32()))), "finite"),
        (table_of(pa.array([[1, None], [1, 2]], pa.list_(pa.float32()))), "null is not"),
        (table_of(pa.array([1.0, 2.0], pa.float32())), "shape"),
        (table_of(TENSOR, k=[1, 2]).slice(0, 0), "0 rows, wanted 1 to 4096"),
    ],
)
def test_wrong_tables_are_told_what_was_expected(table: pa.Table, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        rows_of_stream(stream(table), INPUTS)


@given(st.data())
def test_damaged_streams_raise_nothing_else(data: st.DataObject) -> None:
    whole = bytearray(stream(table_of(pa.array(LISTS, pa.list_(pa.float32())))))
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=4)):
        whole[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    with contextlib.suppress(BadRequest):
        rows_of_stream(bytes(whole[:cut]), INPUTS)


@given(
    arrays.arrays(np.float32, arrays.array_shapes(min_dims=1, max_dims=3, max_side=3)),
    st.text(max_size=4),
)
def test_outputs_are_columns(values: np.ndarray[Any, Any], identity: str) -> None:
    with pa.ipc.open_stream(stream_of("m", 3, identity, {"p": values})) as out:
        table = out.read_all()
    assert table.schema.metadata == {
        b"model_name": b"m",
        b"model_version": b"3",
        b"id": identity.encode(),
    }
    column: Any = table["p"].combine_chunks()
    if values.ndim == 2:
        column = column.flatten()
    if values.ndim == 3:
        column = column.storage.flatten()
    assert column.to_numpy().tobytes() == values.tobytes()
