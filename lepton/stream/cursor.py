"""Where a stream stands: a few integers, the same on every rank, good at any world size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lepton.errors import StreamError

VERSION = 2


@dataclass(frozen=True, slots=True)
class Cursor:
    """Rows consumed so far.

    Attributes:
        epoch: the epoch under way, from 0.
        rows: rows of it that are consumed, over all ranks together.
        order: fingerprint of what the order depends on (table, seed, batch size, lanes, filter);
            empty means unchecked.
        version: table version of the epoch under way, for a stream that follows its table.
    """

    epoch: int = 0
    rows: int = 0
    order: str = ""
    version: int | None = None

    def after(self, rows: int, epoch_rows: int) -> Cursor:
        """Return the cursor after ``rows`` more rows; the end of an epoch begins the next."""
        done = self.rows + rows
        if done >= epoch_rows:
            return Cursor(self.epoch + 1, 0, self.order, self.version)
        return Cursor(self.epoch, done, self.order, self.version)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"v": VERSION, **asdict(self)}


def cursor_of(state: Mapping[str, Any] | Cursor | str) -> Cursor:
    """Read a cursor back from ``state_dict()``, or from its JSON text.

    Raises:
        StreamError: it is not a cursor of a version that this lepton reads.
    """
    if isinstance(state, Cursor):
        return state
    try:
        found: Mapping[str, Any] = json.loads(state) if isinstance(state, str) else state
        if found["v"] != VERSION:
            raise StreamError(
                f"the cursor has version {found['v']!r}, this lepton reads {VERSION}: "
                "resume with the lepton that wrote it"
            )
        version = found.get("version")
        cursor = Cursor(
            int(found["epoch"]),
            int(found["rows"]),
            str(found["order"]),
            None if version is None else int(version),
        )
    except (KeyError, TypeError, ValueError) as e:
        raise StreamError(f"{state!r} is not a stream cursor: pass a shard's state_dict()") from e
    if cursor.epoch < 0 or cursor.rows < 0:
        raise StreamError(f"{state!r} is not a stream cursor: counts cannot be negative")
    return cursor
