"""Which rows of a data file are deleted: read by whoever reads that file, and by nobody before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lepton.errors import LakeError
from lepton.lake.log import DataFile, Version
from lepton.lake.paths import located, path_of
from lepton.lake.vectors import Rows, Vector, deleted_rows, file_of, framed, inline


def deleted_of(
    version: Version, file: DataFile, rows: int, options: Mapping[str, str] | None = None
) -> Rows:
    """Return the stored positions that a file's deletion vector deletes, ascending.

    Raises:
        LakeError: the vector is lost or damaged, or deletes a row that the file does not have.
    """
    if file.vector is None:
        return np.empty(0, np.int64)
    deleted = _read(version, file.path, file.vector, options)
    if len(deleted) and deleted[-1] >= rows:
        raise LakeError(
            f"the deletion vector of file {file.path!r} of table {version.uri!r}@{version.number} "
            f"deletes row {deleted[-1]}, and the file has {rows}: restore the file or the vector "
            "from a copy, or the table to an older version"
        )
    return deleted


def mask_of(deleted: Rows, rows: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return a boolean per stored row: whether it is still there."""
    kept = np.ones(rows, bool)
    kept[deleted] = False
    return kept


def _read(version: Version, path: str, vector: Vector, options: Mapping[str, str] | None) -> Rows:
    place = ""
    try:
        found = file_of(vector)
        place = f" ({found})" if found else ""
        if found is None:
            return deleted_rows(vector, inline(vector))
        stored = _stored(version.uri, found, vector, options)
        return deleted_rows(vector, framed(vector, stored))
    except (OSError, ValueError) as e:
        raise LakeError(
            f"cannot read the deletion vector{place} of file {path!r} of table {version.uri!r}"
            f"@{version.number}: {e}; restore it from a copy (such files are called "
            "deletion_vector_*.bin), or the table to an older version"
        ) from e


def _stored(uri: str, path: str, vector: Vector, options: Mapping[str, str] | None) -> bytes:
    at = 1 if vector.offset is None else vector.offset  # a byte for the layout's version is first
    store, full = located(path_of(uri, path), options)
    with store.open_input_file(full) as source:
        read: Any = source.read_at
        return bytes(read(vector.size + 8, at))
