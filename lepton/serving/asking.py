"""What a caller has, as the rows that a model takes: a table, a data frame or arrays. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, cast

import numpy as np
import pyarrow as pa

from lepton.errors import ServingError
from lepton.serving.inputs import ARROW


def table_of(rows: Any, inputs: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return rows with exactly a model's inputs, in the types it takes.

    Args:
        rows: an Arrow table or batch, a pandas frame, or a mapping of names to arrays, tensors
            or lists of shape (rows, …). Columns that the model does not take are left out.
        inputs: of the model's metadata: name, datatype and shape each.

    Raises:
        ServingError: a column is missing, or its values are not of the input's type and shape.
    """
    given = _columns(rows)
    missing = [i["name"] for i in inputs if i["name"] not in given]
    if missing:
        raise ServingError(f"the model takes columns {missing}, which are not given")
    columns = {str(i["name"]): _column(given[i["name"]], i) for i in inputs}
    counts = {name: len(column) for name, column in columns.items()}
    if len(set(counts.values())) != 1:
        raise ServingError(f"the columns have different numbers of rows: {counts}")
    return pa.table(columns)


def _columns(rows: Any) -> Mapping[str, Any]:
    if isinstance(rows, pa.Table | pa.RecordBatch):
        return {name: rows.column(name) for name in rows.schema.names}
    if hasattr(rows, "iloc"):  # a pandas frame, without importing pandas
        frame: Any = rows
        return {str(name): frame[name] for name in frame.columns}
    if isinstance(rows, Mapping):
        return cast("Mapping[str, Any]", rows)
    raise ServingError(
        f"cannot predict from {type(rows).__name__}: give an Arrow table, a pandas frame, or a "
        "mapping of column names to arrays"
    )


def _column(values: Any, spec: Mapping[str, Any]) -> Any:
    name, kind, shape = spec["name"], ARROW[spec["datatype"]], tuple(spec["shape"][1:])
    try:
        if isinstance(values, pa.Array | pa.ChunkedArray):
            return _cast(values, kind)
        if hasattr(values, "detach"):  # a torch tensor, without importing torch
            values = values.detach().cpu().numpy()
        if kind == pa.string() or _has_nulls(values):
            return pa.array(list(values), kind)
        array: Any = np.asarray(values if hasattr(values, "dtype") else list(values))
        if array.dtype == object:
            array = np.stack([np.asarray(v) for v in array])
        flat = pa.array(np.ascontiguousarray(array).reshape(-1)).cast(kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, ValueError) as e:
        raise ServingError(f"column {name!r} does not hold {spec['datatype']}: {e}") from e
    if array.shape[1:] != shape:
        raise ServingError(f"column {name!r} has rows of shape {array.shape[1:]}, wanted {shape}")
    return pa.FixedSizeListArray.from_arrays(flat, prod(shape)) if shape else flat


def _cast(column: Any, kind: pa.DataType) -> Any:
    """Numbers in the type the model takes; how rows are nested, the replica looks at itself."""
    if pa.types.is_list(column.type) and pa.types.is_primitive(column.type.value_type):
        return column.cast(pa.list_(kind))
    return column.cast(kind) if pa.types.is_primitive(column.type) else column


def _has_nulls(values: Any) -> bool:
    if hasattr(values, "isna"):
        return bool(values.isna().any())
    return isinstance(values, Sequence) and any(v is None for v in cast("Sequence[Any]", values))
