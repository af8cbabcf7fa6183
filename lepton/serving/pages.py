"""Rows of answers, side by side as they came, until the inference log writes them.

The rows of a request are copied to where those before it lie, by one look at memory that lets
nobody else run. Kept one by one, a second's worth would be put together array by array, each time
asking the requests for the interpreter, and would keep as much memory from being used again.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from lepton.serving.arrays import Arrays, column_of

PAGE_BYTES = 4 * 2**20


class Page:
    """Rows of one form.

    Args:
        form: of the inputs and of the outputs, as :func:`form_of` tells it.
        rows: how many fit.
    """

    def __init__(self, form: Any, rows: int) -> None:
        self.form = form
        self.columns: list[tuple[str, np.ndarray[Any, Any]]] = []
        self._views: list[tuple[memoryview, int]] = []
        self._used = 0
        self._rows = rows
        for prefix, arrays in zip(("", "answer_"), form, strict=True):
            for name, dtype, shape in arrays:
                values: Any = np.empty((rows, *shape), dtype)
                self.columns.append((prefix + name, values))
                self._views.append((values.data.cast("B"), values.nbytes // rows))
        self.row_bytes = sum(size for _, size in self._views)

    def take(self, arrays: Sequence[np.ndarray[Any, Any]], count: int) -> Place | None:
        """Copy a request's arrays, or return None where they do not fit in any more."""
        start, end = self._used, self._used + count
        if end > self._rows:
            return None
        for (view, size), values in zip(self._views, arrays, strict=True):
            view[start * size : end * size] = np.ascontiguousarray(values).data.cast("B")
        self._used = end
        return Place(self, start, count)


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a request's rows are."""

    page: Page
    start: int
    count: int

    @property
    def size(self) -> int:
        """Bytes of its rows."""
        return self.count * self.page.row_bytes


def form_of(arrays: Mapping[str, np.ndarray[Any, Any]]) -> tuple[Any, ...]:
    """Return what arrays of one form have in common: names, types, and shapes without the rows."""
    return tuple([(name, v.dtype, v.shape[1:]) for name, v in arrays.items()])


def placed(
    rows: Arrays, outputs: Mapping[str, np.ndarray[Any, Any]], pages: MutableMapping[Any, Page]
) -> Place | None:
    """Put a request's inputs and outputs onto the page of their form; None for what no page takes.

    Args:
        rows: the inputs.
        outputs: by name, arrays of as many rows.
        pages: by form; a new one comes for one that is full.
    """
    form = form_of(rows.columns), form_of(outputs)
    arrays = [*rows.columns.values(), *outputs.values()]
    if not all(_fits(v, rows.count) for v in arrays):
        return None
    page = pages.get(form)
    place = page.take(arrays, rows.count) if page else None
    if place is None:
        room = PAGE_BYTES * rows.count // sum(v.nbytes for v in arrays)
        page = pages[form] = Page(form, max(room, rows.count))
        place = page.take(arrays, rows.count)
    return place


def _fits(values: np.ndarray[Any, Any], count: int) -> bool:
    """Whether an array is numbers as this machine has them, so many rows of at least one."""
    plain = values.dtype.isnative and values.dtype.char in "fd?bBhHiIlLqQ"
    return plain and values.size > 0 and len(values) == count


def columns_in(places: Sequence[Place]) -> dict[str, Any]:
    """Return the rows at places of one form as columns of an Arrow table."""
    runs: list[list[Any]] = []
    for place in places:
        if runs and runs[-1][0] is place.page and runs[-1][2] == place.start:
            runs[-1][2] += place.count
        else:
            runs.append([place.page, place.start, place.start + place.count])
    names = [name for name, _ in places[0].page.columns]
    return {
        name: pa.chunked_array(
            [listed(column_of(page.columns[at][1][start:end])) for page, start, end in runs]
        )
        for at, name in enumerate(names)
    }


def listed(array: Any) -> Any:
    """Delta has lists of any length only."""
    if pa.types.is_fixed_size_list(array.type):
        return array.cast(pa.list_(array.type.value_type))
    return array
