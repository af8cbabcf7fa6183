r"""Divide rows into training and test by a hash of a key, so that a row never changes sides.

A row's side is a pure function of its key, the share and the salt: it does not depend on other
rows, their order, the batch, the process or the machine. As a table grows, no row that was tested
on is ever trained on. Raising ``train`` only moves rows from test to train.

The hash is BLAKE2b of 8 bytes over the UTF-8 text ``salt + "\0" + key``, read as a big-endian
integer h; integers are written in decimal. The row is in train when h / 2**64 < train.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lepton.preprocess.elements import is_text


def assign_split(
    table: pa.Table, *, key: str, train: float = 0.8, column: str = "split", salt: str = ""
) -> pa.Table:
    """Append a string column that says ``"train"`` or ``"test"`` for each row.

    Rows with equal keys land on the same side: choose a key that names what must not leak, such
    as the patient and not the picture.

    Args:
        table: rows with a key column of strings or integers without nulls.
        key: the key column.
        train: the share of keys, in [0, 1], that go to train.
        column: the name of the new column.
        salt: another salt gives another, independent division.

    Raises:
        ValueError: the key is missing, null somewhere or of another type, the new column exists,
            or the share is outside [0, 1].
    """
    if not 0 <= train <= 1:
        raise ValueError(f"train must be a share between 0 and 1, not {train}")
    if table.schema.names.count(key) != 1:
        raise ValueError(f"no single key column {key!r}: the table has {table.schema.names}")
    if column in table.schema.names:
        raise ValueError(f"the table already has a column {column!r}: choose another name")
    keys = _keys(table.column(key), key)
    distinct = pc.unique(keys)
    threshold = int(train * 2**64)  # exact: scaling by a power of two
    values: list[Any] = distinct.to_pylist()
    sides = ["train" if _hash(v, salt) < threshold else "test" for v in values]
    split = pc.take(pa.array(sides, pa.string()), pc.index_in(keys, value_set=distinct))
    return table.append_column(pa.field(column, pa.string()), split)


def _keys(keys: Any, name: str) -> pa.ChunkedArray[Any]:
    if isinstance(keys.type, pa.DictionaryType):
        keys = keys.cast(keys.type.value_type)
    if not (is_text(keys.type) or pa.types.is_integer(keys.type)):
        raise ValueError(
            f"key column {name!r} is {keys.type}: only strings and integers have one text each; "
            "cast it first"
        )
    if keys.null_count:
        raise ValueError(
            f"key column {name!r} has {keys.null_count} nulls: a row without a key has no fixed "
            "side; filter those rows out or choose another key"
        )
    return keys


def _hash(value: str | int, salt: str) -> int:
    return int.from_bytes(blake2b(f"{salt}\0{value}".encode(), digest_size=8).digest(), "big")
