"""Arrow IPC streams as requests and answers: a column for each input and each output. Pure.

Many rows of many columns travel so at the cost of a copy. The checks are those of every request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lepton.serving.inputs import ARROW, MAX_ROWS, BadRequest, Input, checked, expected

MEDIA_TYPE = "application/vnd.apache.arrow.stream"


def rows_of_stream(body: bytes, inputs: Sequence[Input]) -> pa.Table:
    """Parse an Arrow IPC stream into raw rows.

    Raises:
        BadRequest: not such a stream, or what :func:`rows_of` refuses.
    """
    try:
        with pa.ipc.open_stream(body) as stream:
            table: Any = stream.read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, MemoryError, ValueError) as e:
        raise BadRequest(f"the body is no whole Arrow IPC stream: {e}; {expected(inputs)}") from e
    return rows_of(table, inputs)


def rows_of(table: pa.Table, inputs: Sequence[Input]) -> pa.Table:
    """Return a table's rows as the model takes them, checked.

    Raises:
        BadRequest: columns, types, sizes or values that the model does not take.
    """
    names = table.column_names
    if len(names) != len(set(names)) or set(names) != {i.name for i in inputs}:
        raise BadRequest(f"columns are {names}; {expected(inputs)}")
    if not 1 <= len(table) <= MAX_ROWS:
        raise BadRequest(f"there are {len(table)} rows, wanted 1 to {MAX_ROWS}")
    whole: dict[str, Any] = {i.name: table.column(i.name).combine_chunks() for i in inputs}
    return pa.table({i.name: _column(whole[i.name], i) for i in inputs})


def _column(array: Any, spec: Input) -> Any:
    flat, sizes = _flattened(array, spec)
    kind = ARROW[spec.datatype]
    if sizes not in (spec.shape, (prod(spec.shape),) if spec.shape else ()):
        raise BadRequest(
            f"column {spec.name!r} has rows of shape {list(sizes)}, wanted {list(spec.shape)}"
        )
    if spec.datatype == "BYTES" and _is_text(flat.type):
        flat = flat.cast(kind)
    if flat.type != kind:
        raise BadRequest(f"column {spec.name!r} holds {flat.type}, wanted {kind}")
    return checked(flat, spec)


def _flattened(array: Any, spec: Input) -> tuple[Any, tuple[int, ...]]:
    """Return the innermost values and the size of each level of lists."""
    kind = array.type
    if isinstance(kind, pa.FixedShapeTensorType):
        _refuse_missing(array, spec)
        return array.storage.flatten(), tuple(kind.shape)
    if isinstance(kind, pa.BaseExtensionType):
        return _flattened(array.storage, spec)
    if not _is_list(kind):
        return array, ()
    _refuse_missing(array, spec)
    count: Any = pc.list_value_length
    lengths: Any = pc.min_max(count(array))
    low, high = lengths["min"].as_py(), lengths["max"].as_py()
    if low != high:
        raise BadRequest(f"column {spec.name!r} has lists of {low} to {high} values in a row")
    values: Any = array.flatten()
    inner, sizes = _flattened(values, spec)
    return inner, (low or 0, *sizes)


def _refuse_missing(array: Any, spec: Input) -> None:
    if array.null_count:
        raise BadRequest(f"column {spec.name!r}: a whole list is null")


def _is_list(kind: Any) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _is_text(kind: Any) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def stream_of(
    model: str, version: int, identity: str, outputs: Mapping[str, np.ndarray[Any, Any]]
) -> bytes:
    """Return outputs as an Arrow IPC stream; who answered is in the schema's metadata."""
    table = pa.table({name: _entries(values) for name, values in outputs.items()})
    told = {"model_name": model, "model_version": str(version), "id": identity}
    return stream_of_rows(table.replace_schema_metadata(told))


def stream_of_rows(table: pa.Table) -> bytes:
    """Return a table as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


def outputs_of_stream(body: bytes) -> dict[str, np.ndarray[Any, Any]]:
    """Return the outputs of an answer as arrays of shape (rows, …)."""
    with pa.ipc.open_stream(body) as stream:
        table: Any = stream.read_all()
    return {name: _array(table.column(name).combine_chunks()) for name in table.column_names}


def _array(column: Any) -> np.ndarray[Any, Any]:
    if isinstance(column.type, pa.FixedShapeTensorType):
        return column.to_numpy_ndarray().copy()
    if not _is_list(column.type):
        return column.to_numpy(zero_copy_only=False).copy()
    width = column.type.list_size
    return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width).copy()


def _entries(values: np.ndarray[Any, Any]) -> Any:
    values = np.ascontiguousarray(values)
    if values.ndim == 1:
        return pa.array(values)
    if values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    return pa.FixedShapeTensorArray.from_numpy_ndarray(values)
