"""Days before 15 October 1582 in files of writers that counted them by the Julian calendar.

Pure. Spark before 3.0, and later ones that are asked to, write such days as they were counted then,
and say so in the file's footer. The date that was meant is another day number today: the same year,
month and day by the Gregorian calendar, which is what every other reader and writer means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

pc: Any = pyarrow.compute  # its stubs know no arrays of unknown type
Ints = np.ndarray[Any, np.dtype[np.int64]]

_SPARK = b"org.apache.spark."
_ZONES = (b"UTC", b"Etc/UTC", b"GMT", b"Z", b"+00:00", b"Etc/GMT")
_CHANGED = -141_427  # 15 October 1582, the first Gregorian day, from 1970
_LOCAL = -2_208_988_800_000_000  # 1900: before it, zones had odd offsets that calendars differ in
_DAY = 86_400_000_000  # in microseconds


@dataclass(frozen=True, slots=True)
class Julian:
    """What of a file is counted by the Julian calendar.

    Attributes:
        dates: days are.
        times: timestamps are.
        utc: timestamps were counted in UTC, not in a local zone or one that nobody tells.
    """

    dates: bool
    times: bool
    utc: bool


def julian_of(metadata: Any) -> Julian | None:
    """Return what a file's footer (``pyarrow.parquet.FileMetaData``) says; None for nothing."""
    told: Mapping[bytes, bytes] = metadata.metadata or {}
    if not any(key.startswith(_SPARK) for key in told):
        return None
    version = told.get(_SPARK + b"version", b"")
    dates = version[:2] in (b"1.", b"2.") or _SPARK + b"legacyDateTime" in told
    times, schema = dates, metadata.schema
    if any(schema.column(c).physical_type == "INT96" for c in range(len(schema))):
        times = version[:2] in (b"1.", b"2.") or version[:4] == b"3.0."
        times |= _SPARK + b"legacyINT96" in told
    if not dates and not times:
        return None
    return Julian(dates, times, told.get(_SPARK + b"timeZone") in _ZONES)


def gregorian(column: Any, julian: Julian) -> Any:
    """Return a column of such a file as it was meant.

    Args:
        column: chunked, as stored.
        julian: what of the file is.

    Raises:
        ValueError: there are times from before 1900 in a zone other than UTC, or old days inside
            nested values.
    """
    kind = column.type
    if pa.types.is_date32(kind):
        return _each(column, gregorian_days) if julian.dates else column
    if pa.types.is_timestamp(kind):
        if not julian.times:
            return column
        micros = column.cast(pa.timestamp("us", kind.tz))
        if not julian.utc:
            _refuse(micros, _LOCAL, "times from before 1900 that it counts in a local zone of old")
            return column
        return _each(micros, _moved)
    for leaf in _leaves(column):
        if pa.types.is_date32(leaf.type) and julian.dates:
            _refuse(leaf, _CHANGED, "days from before 1582 inside other values")
        elif pa.types.is_timestamp(leaf.type) and julian.times:
            whole = leaf.cast(pa.timestamp("us", leaf.type.tz))
            _refuse(whole, _LOCAL, "times from before 1900 inside other values")
    return column


def gregorian_days(days: Ints) -> Ints:
    """Return day numbers (from 1970) of the same dates by the Gregorian calendar.

    Both ways between dates and day numbers are whole-number arithmetic on years that begin in
    March, so that a leap day is a year's last (E. G. Richards, "Mapping Time").
    """
    old = days < _CHANGED
    number = np.where(old, days, _CHANGED) + 2_440_588 + 1401  # Julian day, from an era's beginning
    in_year = (4 * number + 3) % 1461 // 4
    month = (5 * in_year + 2) // 153  # from March
    day = (5 * in_year + 2) % 153 // 5
    year = (4 * number + 3) // 1461 - 4716  # one that begins in March
    era, of_era = year // 400, year % 400
    since = of_era * 365 + of_era // 4 - of_era // 100 + (153 * month + 2) // 5 + day
    return np.where(old, era * 146_097 + since - 719_468, days)


def _moved(micros: Ints) -> Ints:
    days = micros // _DAY
    return gregorian_days(days) * _DAY + micros % _DAY


def _each(column: Any, change: Callable[[Ints], Ints]) -> Any:
    """A column with its values, as whole numbers, changed; null stays null."""
    kind = column.type
    bits = pa.int32() if pa.types.is_date32(kind) else pa.int64()
    make: Any = pa.chunked_array
    done: list[Any] = []
    for chunk in column.chunks:
        values = pc.fill_null(chunk.cast(bits), 0).to_numpy(zero_copy_only=False)
        new: Any = pa.array(change(values.astype(np.int64)), mask=np.asarray(chunk.is_null()))
        done.append(new.cast(bits).cast(kind))
    return make(done, type=kind)


def _leaves(column: Any) -> Iterator[Any]:
    for chunk in column.chunks:
        waiting = [chunk]
        while waiting:
            at = waiting.pop()
            kind = at.type
            if pa.types.is_struct(kind):
                waiting += at.flatten()
            elif pa.types.is_map(kind):
                waiting += [at.keys, at.items]
            elif pa.types.is_nested(kind):
                waiting.append(at.flatten())
            else:
                yield at


def _refuse(values: Any, limit: int, what: str) -> None:
    bits = pa.int32() if pa.types.is_date32(values.type) else pa.int64()
    least = pc.min(values.cast(bits)).as_py()
    if least is not None and least < limit:
        raise ValueError(
            f"a writer of the Julian calendar wrote {what}; rewrite the file with the engine that "
            "wrote it"
        )
