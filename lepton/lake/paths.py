"""Where the files of a table are: as its log names them, and as the storage does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow.fs as pafs

from lepton.lake.storage import store_of


def path_of(uri: str, path: str) -> str:
    """Return the full path of a data file, given as the log does: relative or absolute."""
    if path.startswith("file:"):
        return "/" + path.removeprefix("file:").lstrip("/")
    if "://" in path or Path(path).is_absolute():
        return path
    return f"{uri.rstrip('/')}/{path}"


def located(full: str, options: Mapping[str, str] | None) -> tuple[pafs.FileSystem, str]:
    """Return the file system that holds a full path, and the path in it."""
    if "://" not in full:
        return pafs.LocalFileSystem(), full
    folder, _, name = full.rpartition("/")
    return store_of(folder, options), name
