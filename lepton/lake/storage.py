"""Stores that are asked again: an answer that was cut off, refused or never came is not the last.

The object store library asks again by itself where no answer came; what it does not see to is an
answer that breaks off, and a deltalake call of several requests one of which failed for good.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.fs import DeltaStorageHandler

TRIES = 6
PATIENCE_S = 90.0
"""No new try after this long: what takes longer has been asked again often enough below."""
_PASSES = re.compile(
    r"Generic \w+ error|reading a body|sending request|SlowDown|Slow Down|\b50[0234]\b"
    r"|timed? ?out|connection (was )?(reset|closed|refused)|end of file before",
    re.IGNORECASE,
)
_LASTS = re.compile(r"No such bucket|NoSuchBucket|PermissionDenied|\b40[0134]\b|InvalidAccessKey")

T = TypeVar("T")


def passes(error: BaseException) -> bool:
    """Whether an error of a store may be gone the next time."""
    if isinstance(error, FileNotFoundError | TableNotFoundError | CommitFailedError):
        return False
    text = str(error)
    return _PASSES.search(text) is not None and _LASTS.search(text) is None


def again(do: Callable[[], T]) -> T:
    """Call a function whose repetition does no harm, again while it fails for what may pass.

    Raises:
        DeltaError, OSError, ValueError: as the function does, in the end.
    """
    begun = time.monotonic()
    for attempt in range(1, TRIES):
        try:
            return do()
        except (DeltaError, OSError, ValueError) as e:
            if not passes(e) or time.monotonic() - begun > PATIENCE_S:
                raise
        time.sleep(random.uniform(0, 0.05 * 2**attempt))  # noqa: S311 (no secret)
    return do()


def opened_table(uri: str, options: Mapping[str, str] | None) -> DeltaTable:
    """Open the newest version of a table, as deltalake does.

    Raises:
        TableNotFoundError: there is none.
        DeltaError, OSError, ValueError: it cannot be opened.
    """
    stored = dict(options) if options else None
    if "://" not in uri:
        return DeltaTable(uri, storage_options=stored)
    return again(lambda: DeltaTable(uri, storage_options=stored))


def table_or_none(uri: str, options: Mapping[str, str] | None) -> DeltaTable | None:
    """Open the newest version of a table; None where there is none."""
    if "://" not in uri and not DeltaTable.is_deltatable(uri):
        return None
    try:
        return opened_table(uri, options)
    except TableNotFoundError:
        return None


def store_of(uri: str, options: Mapping[str, str] | None) -> pafs.FileSystem:
    """Return the file system whose root is a folder, which is asked again where that may help."""
    if "://" not in uri:
        return pafs.SubTreeFileSystem(uri, pafs.LocalFileSystem())
    handler: Any = _Patient(uri, dict(options) if options else None)
    return pafs.PyFileSystem(handler)


class _Patient(DeltaStorageHandler):
    """deltalake's file system, of which what does no harm is asked again."""

    def get_file_info(self, paths: list[str]) -> Any:
        return again(lambda: super(_Patient, self).get_file_info(paths))

    def get_file_info_selector(self, selector: Any) -> Any:
        return again(lambda: super(_Patient, self).get_file_info_selector(selector))

    def delete_file(self, path: str) -> None:
        begun = False

        def delete() -> None:
            nonlocal begun
            try:
                super(_Patient, self).delete_file(path)
            except FileNotFoundError:
                if not begun:
                    raise
            finally:
                begun = True

        again(delete)

    def open_input_stream(self, path: str) -> Any:
        return _input(lambda: super(_Patient, self).open_input_file(path))

    def open_input_file(self, path: str) -> Any:
        return _input(lambda: super(_Patient, self).open_input_file(path))


def _input(opens: Callable[[], Any]) -> Any:
    wrap: Any = pa.PythonFile
    return wrap(_Input(opens), mode="r")


class _Input:
    """A file for reading. A read that failed is begun again, on a new handle."""

    def __init__(self, opens: Callable[[], Any]) -> None:
        self._open = opens
        self._file: Any = again(self._open)
        self.closed = False
        self.mode = "rb"

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def isatty(self) -> bool:
        return False

    def size(self) -> int:
        return int(again(self._file.size))

    def tell(self) -> int:
        return int(self._file.tell())

    def seek(self, position: int, whence: int = 0) -> int:
        return int(self._file.seek(position, whence))

    def read(self, nbytes: int | None = None) -> bytes:
        at = self.tell()
        count = self.size() - at if nbytes is None or nbytes < 0 else nbytes

        def read() -> bytes:
            try:
                self._file.seek(at)
                return bytes(self._file.read(count))
            except (OSError, ValueError):
                self._file = again(self._open)
                raise

        return again(read)

    def close(self) -> None:
        self.closed = True

    def flush(self) -> None:
        """There is nothing to flush."""
