"""Paths that a log spells in another way than deltalake would: it could not remove those files.

What deltalake removes it spells in its own way, and replaying a log compares letters. A file whose
``add`` was spelled otherwise, such as with a plain ``ü``, would stay in the table beside what
should take its place, so such a change is refused before any work.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote, unquote

import pyarrow as pa
from deltalake import DeltaTable

from lepton.errors import LakeError

_PLAIN = re.compile(r"[\w.=-][\w./=-]*", re.ASCII)
_KEPT = "/!$&'()+,:;=@"  # beside letters, digits and _.-~


def plain(path: str) -> bool:
    """Whether everybody spells a path alike, and as it is."""
    return _PLAIN.fullmatch(path) is not None


def respelled(path: str) -> str:
    """Return a path, as a log has it, in deltalake's spelling."""
    return quote(unquote(path), safe=_KEPT)


def respelled_files(opened: DeltaTable) -> list[str]:
    """Return the live files that deltalake could not remove, as the log spells them."""
    actions = pa.RecordBatchReader.from_stream(opened.get_add_actions()).read_all()
    paths: Any = actions["path"].to_pylist()
    return [p for p in paths if not plain(p) and respelled(p) != p]


def refuse_respelled(opened: DeltaTable, what: str) -> None:
    """Raise LakeError if a live file of a table is one that deltalake could not remove."""
    lost = respelled_files(opened)
    if lost:
        raise LakeError(
            f"table {what} has {len(lost)} files whose paths deltalake spells otherwise than the "
            f"log, such as {min(lost)!r}: it could not remove them, and their rows would stay; "
            "nothing was written: change the table with the engine that wrote them"
        )
