"""Columns seen as numbers: a scalar column, or the elements of a list or tensor column.

A mapping over elements keeps the row count, null rows, list lengths and tensor shapes; only the
element type may change. Nothing here looks at more than one element at a time, so a row alone
gives the same bits as the same row in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


def is_scalar(data_type: pa.DataType) -> bool:
    """Return whether a row of this type is one value, not a list or tensor."""
    return element_type(data_type) == data_type


def is_number(data_type: pa.DataType) -> bool:
    """Return whether a scalar type holds numbers; the type of a column of nulls counts as one."""
    return (
        pa.types.is_integer(data_type)
        or pa.types.is_floating(data_type)
        or pa.types.is_null(data_type)
    )


def is_text(data_type: pa.DataType) -> bool:
    """Return whether a scalar type holds strings."""
    return (
        pa.types.is_string(data_type)
        or pa.types.is_large_string(data_type)
        or pa.types.is_string_view(data_type)
    )


def element_type(data_type: pa.DataType) -> pa.DataType:
    """Return the type of the innermost elements of a list or tensor type, else the type itself."""
    if isinstance(data_type, pa.FixedShapeTensorType):
        return element_type(cast(Any, data_type).value_type)
    if _is_list(data_type):
        return element_type(cast("pa.ListType[Any]", data_type).value_type)
    return data_type


def with_elements(data_type: pa.DataType, element: pa.DataType) -> pa.DataType:
    """Return ``data_type`` with another type of innermost elements."""
    if isinstance(data_type, pa.FixedShapeTensorType):
        return pa.fixed_shape_tensor(
            element, data_type.shape, data_type.dim_names, data_type.permutation
        )
    if not _is_list(data_type):
        return element
    listed = cast("pa.ListType[Any]", data_type)
    inner = listed.value_field.with_type(with_elements(listed.value_type, element))
    if pa.types.is_fixed_size_list(data_type):
        return pa.list_(inner, data_type.list_size)
    return pa.large_list(inner) if pa.types.is_large_list(data_type) else pa.list_(inner)


def flatten(array: pa.Array[Any]) -> pa.Array[Any]:
    """Return the innermost elements of an array; null lists have none."""
    if isinstance(array, pa.ExtensionArray):
        return flatten(cast(Any, array).storage)
    if _is_list(array.type):
        return flatten(cast(Any, array).flatten())
    return array


def map_elements(
    column: pa.ChunkedArray[Any],
    function: Callable[[pa.Array[Any]], pa.Array[Any]],
    element: pa.DataType,
) -> pa.ChunkedArray[Any]:
    """Apply an elementwise function that returns arrays of type ``element``."""
    to: Any = with_elements(column.type, element)
    return pa.chunked_array([_mapped(chunk, function, to) for chunk in column.chunks], type=to)


def to_floats(array: pa.Array[Any]) -> Floats:
    """Return float64 values, NaN for null."""
    return np.asarray(
        pc.cast(array, pa.float64(), safe=False).to_numpy(zero_copy_only=False), np.float64
    )


def numbers_in(column: pa.ChunkedArray[Any]) -> Iterator[Floats]:
    """Yield the elements of each chunk as float64, NaN for null."""
    for chunk in column.chunks:
        yield to_floats(flatten(chunk))


def _is_list(data_type: pa.DataType) -> bool:
    return (
        pa.types.is_list(data_type)
        or pa.types.is_large_list(data_type)
        or pa.types.is_fixed_size_list(data_type)
    )


def _mapped(
    array: pa.Array[Any],
    function: Callable[[pa.Array[Any]], pa.Array[Any]],
    to: pa.DataType,
) -> pa.Array[Any]:
    if isinstance(to, pa.FixedShapeTensorType):
        storage = _mapped(cast(Any, array).storage, function, to.storage_type)
        return pa.ExtensionArray.from_storage(cast(Any, to), storage)
    if not _is_list(to):
        return function(array)
    if not len(array):
        return pa.array([], type=to)
    if pa.types.is_fixed_size_list(to):
        return _mapped_fixed(cast("pa.FixedSizeListArray[Any, Any]", array), function, to)
    return _mapped_list(array, function, to)


def _mapped_fixed(
    array: pa.FixedSizeListArray[Any, Any],
    function: Callable[[pa.Array[Any]], pa.Array[Any]],
    to: pa.DataType,
) -> pa.Array[Any]:
    fixed: Any = to
    size = fixed.list_size
    stored = array.values.slice(array.offset * size, len(array) * size)  # null rows keep a place
    values = _mapped(stored, function, fixed.value_type)
    return pa.FixedSizeListArray.from_arrays(values, type=fixed, mask=_nulls(array))


def _mapped_list(
    array: Any,
    function: Callable[[pa.Array[Any]], pa.Array[Any]],
    to: Any,
) -> pa.Array[Any]:
    offsets: Any = np.asarray(array.offsets)
    stored = array.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
    kind = pa.LargeListArray if pa.types.is_large_list(to) else pa.ListArray
    return kind.from_arrays(
        cast(Any, pa.array(offsets - offsets[0])),
        _mapped(stored, function, to.value_type),
        type=to,
        mask=_nulls(array),
    )


def _nulls(array: pa.Array[Any]) -> Any:
    return pc.is_null(array) if array.null_count else None
