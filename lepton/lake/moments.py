"""Which version of a table was current at a time (Delta protocol, "In-Commit Timestamps").

Where the table keeps in-commit timestamps, they count, and a copied log means the same; elsewhere
only the times of the commits' files are there to go by, made ascending.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from lepton.errors import LakeError
from lepton.lake.history import actions_of, infos_of, log_folder

_COMMIT = re.compile(r"(\d{20})\.json")


def version_at(
    uri: str,
    moment: datetime,
    newest: int,
    configuration: Mapping[str, Any],
    options: Mapping[str, str] | None,
) -> int:
    """Return the newest version that was there at a time; without a zone it is in UTC.

    Args:
        uri: the table.
        moment: the time.
        newest: the newest version to consider.
        configuration: the table's properties.
        options: as deltalake takes them.

    Raises:
        LakeError: the log does not go back to that time, or cannot be read.
    """
    moment = moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    written = _written(uri, newest, options)
    if str(configuration.get("delta.enableInCommitTimestamps", "")).lower() == "true":
        since = int(configuration.get("delta.inCommitTimestampEnablementVersion") or 0)
        stamped = [n for n in sorted(written) if n >= since]
        at = bisect_right(stamped, moment, key=lambda n: _stamp(uri, n, options))
        if at:
            return stamped[at - 1]
        oldest = _stamp(uri, stamped[0], options) if stamped else None
        written = {n: t for n, t in written.items() if n < since}
    else:
        oldest = None
    times = _ascending(written)
    at = bisect_right(times, moment, key=lambda pair: pair[1])
    if at:
        return times[at - 1][0]
    oldest = times[0][1] if times else oldest
    raise LakeError(
        f"table {uri!r} has no version of {moment.isoformat()}: its log begins at "
        f"{oldest.isoformat() if oldest else 'no known time'}; ask for a later time, or for a "
        "version by its number"
    )


def _written(uri: str, newest: int, options: Mapping[str, str] | None) -> dict[int, datetime]:
    """When each commit's file was written."""
    found: dict[int, datetime] = {}
    for info in infos_of(*log_folder(uri, options)):
        m = _COMMIT.fullmatch(str(info.base_name))
        if m and int(m[1]) <= newest and info.mtime is not None:
            found[int(m[1])] = info.mtime.astimezone(UTC)
    return found


def _ascending(written: Mapping[int, datetime]) -> list[tuple[int, datetime]]:
    """Commits with their times; one that seems older than the one before came just after it."""
    times: list[tuple[int, datetime]] = []
    for number in sorted(written):
        time = written[number]
        if times and time <= times[-1][1]:
            time = times[-1][1] + timedelta(milliseconds=1)
        times.append((number, time))
    return times


def _stamp(uri: str, number: int, options: Mapping[str, str] | None) -> datetime:
    for action in actions_of(uri, number, options) or ():
        info: dict[str, Any] = action.get("commitInfo") or {}
        stamp = info.get("inCommitTimestamp")
        if stamp is not None:
            return datetime.fromtimestamp(int(stamp) / 1000, UTC)
    raise LakeError(
        f"commit {number} of table {uri!r} has no in-commit timestamp, which the table promises; "
        "ask for a version by its number"
    )
