"""Table names looked up in a Ray Data catalog, such as Unity Catalog."""

from __future__ import annotations

from collections.abc import Mapping

import ray.data
from ray.data.catalog import ReaderFormat

from lepton.errors import LakeError


def resolve(
    name: str, catalog: ray.data.Catalog, storage_options: Mapping[str, str] | None
) -> tuple[str, dict[str, str]]:
    """Return the table's URL and the storage options to open it with; given options win.

    Raises:
        LakeError: the catalog has no place or no Delta format for the name.
    """
    found = catalog.resolve(name, reader=ReaderFormat.DELTA)
    if not found.path:
        raise LakeError(f"the catalog tells no path for table {name!r}: check the name and rights")
    if found.data_format not in (None, ReaderFormat.DELTA):
        raise LakeError(f"table {name!r} is no Delta table: the catalog says {found.data_format}")
    options = {k: str(v) for k, v in (found.storage_options or {}).items()}
    return found.path, {**options, **(storage_options or {})}
