"""Which columns of a data file a dictionary pays for (Parquet's "Dictionary Encoding").

Pure. Where nearly every value is another one, as with measured floats, a dictionary takes half of
the writer's time and makes the file larger; where values come again it makes it several times
smaller. A few stretches of the rows tell which: rows that lie together are often alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute

pc: Any = pyarrow.compute  # its stubs know no arrays of unknown type
STRETCHES, STRETCH = 8, 1024
_DISTINCT = 0.95
"""Of the values that were looked at: with more, there are too many others for a dictionary."""


def repeating(rows: pa.Table) -> list[str]:
    """Return the Parquet paths of the columns, nested ones too, in which values come again."""
    found: dict[tuple[str, ...], list[Any]] = {}
    for part in _stretches(rows):
        schema: Any = part.schema
        for at, field in enumerate(schema):
            column: Any = part.column(at)
            for chunk in column.chunks:
                for path, values in _leaves((field.name,), chunk):
                    found.setdefault(path, []).append(values.slice(0, STRETCH).drop_null())
    return [".".join(path) for path, pieces in found.items() if _repeats(pieces)]


def _stretches(rows: pa.Table) -> list[pa.Table]:
    if len(rows) <= STRETCHES * STRETCH:
        return [rows]
    step = (len(rows) - STRETCH) // (STRETCHES - 1)
    return [rows.slice(n * step, STRETCH) for n in range(STRETCHES)]


def _leaves(path: tuple[str, ...], array: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the values of plain types inside an array, by their paths in the file."""
    kind = array.type
    if pa.types.is_struct(kind):
        for i in range(kind.num_fields):
            yield from _leaves((*path, kind.field(i).name), array.field(i))
    elif pa.types.is_map(kind):
        start, stop = (array.offsets[i].as_py() for i in (0, len(array)))
        yield from _leaves((*path, "key_value", "key"), array.keys[start:stop])
        yield from _leaves((*path, "key_value", "value"), array.items[start:stop])
    elif pa.types.is_nested(kind):
        yield from _leaves((*path, "list", "element"), array.flatten())
    else:
        yield path, array


def _repeats(pieces: list[Any]) -> bool:
    values: Any = pa.chunked_array(pieces)
    return pc.count_distinct(values).as_py() <= _DISTINCT * len(values)
