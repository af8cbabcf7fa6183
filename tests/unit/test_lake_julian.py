"""Old days of writers that counted by the Julian calendar are the dates that they meant."""

import datetime as dt
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lepton
from benchmarks.conformance_log import Log, array_of, column, metadata, protocol
from lepton.errors import LakeError
from lepton.lake.julian import gregorian_days, julian_of

FIRST = dt.date(1582, 10, 15)
LEGACY = {
    b"org.apache.spark.version": b"3.5.0",
    b"org.apache.spark.legacyDateTime": b"",
    b"org.apache.spark.timeZone": b"UTC",
}


def number(day: dt.date) -> int:
    return (day - dt.date(1970, 1, 1)).days


def julian_number(year: int, month: int, day: int) -> int:
    """The day number of a date of the Julian calendar, counted out year by year and month by month.

    Its 5 October 1582 would have been the Gregorian 15 October.
    """
    lengths = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]

    def of_year(y: int, m: int, d: int) -> int:
        leap = y % 4 == 0
        return sum(lengths[: m - 1]) + (leap and m > 2) + d

    days = sum(366 if y % 4 == 0 else 365 for y in range(year, 1582))
    return number(FIRST) - (days + of_year(1582, 10, 5) - of_year(year, month, day))


@given(
    st.dates(dt.date(1, 1, 1), FIRST - dt.timedelta(1)).filter(lambda d: d < dt.date(1582, 10, 5))
)
def test_a_date_stays_the_same_date(day: dt.date) -> None:
    counted = julian_number(day.year, day.month, day.day)
    assert gregorian_days(np.array([counted])).tolist() == [number(day)]


@given(st.dates(FIRST, dt.date(9999, 12, 31)))
def test_later_days_stay(day: dt.date) -> None:
    assert gregorian_days(np.array([number(day)])).tolist() == [number(day)]


def test_a_day_that_only_the_julian_calendar_has_is_the_next() -> None:
    leap = julian_number(1500, 2, 29)
    assert gregorian_days(np.array([leap])).tolist() == [number(dt.date(1500, 3, 1))]
    assert gregorian_days(np.array([-719_164])).tolist() == [number(dt.date(1, 1, 1))]


TOLD: list[tuple[dict[bytes, bytes], bool, tuple[bool, bool] | None]] = [
    ({}, False, None),
    ({b"other": b"2.4"}, False, None),
    ({b"org.apache.spark.version": b"3.5.0"}, True, None),
    ({b"org.apache.spark.version": b"2.4.8"}, False, (True, True)),
    ({b"org.apache.spark.version": b"2.4.8"}, True, (True, True)),
    ({b"org.apache.spark.version": b"3.0.3"}, False, None),
    ({b"org.apache.spark.version": b"3.0.3"}, True, (False, True)),
    (LEGACY, False, (True, True)),
    (LEGACY, True, (True, False)),
    (LEGACY | {b"org.apache.spark.legacyINT96": b""}, True, (True, True)),
]


@pytest.mark.parametrize(("footer", "int96", "expected"), TOLD)
def test_the_footer_tells(
    tmp_path: Path, footer: dict[bytes, bytes], int96: bool, expected: tuple[bool, bool] | None
) -> None:
    rows = pa.table({"t": pa.array([0], pa.timestamp("us"))}).replace_schema_metadata(footer)
    pq.write_table(rows, tmp_path / "a", use_deprecated_int96_timestamps=int96)
    found = julian_of(pq.read_metadata(tmp_path / "a"))
    assert expected == (None if found is None else (found.dates, found.times))
    assert found is None or found.utc == (b"org.apache.spark.timeZone" in footer)


def stored(root: Path, kinds: dict[str, Any], rows: pa.Table, footer: dict[bytes, bytes]) -> Path:
    log = Log(root)
    log.commit(protocol(["timestampNtz"]), metadata([column(n, k) for n, k in kinds.items()]))
    log.commit(log.add("a.parquet", rows.replace_schema_metadata(footer), stats={}))
    return root


DAYS = [julian_number(1, 1, 1), None, julian_number(1500, 12, 31), number(FIRST), 19_000]
DATES = [dt.date(1, 1, 1), None, dt.date(1500, 12, 31), FIRST, dt.date(2022, 1, 8)]


def old_rows() -> pa.Table:
    micros = [None if d is None else d * 86_400_000_000 + 1 for d in DAYS]
    return pa.table(
        {
            "d": pa.array(DAYS, pa.int32()).cast(pa.date32()),
            "t": pa.array(micros).cast(pa.timestamp("us", "UTC")),
            "x": pa.array(range(5)),
        }
    )


KINDS = {"d": "date", "t": "timestamp", "x": "long"}


def test_old_dates_and_times_are_read_as_they_were_meant(tmp_path: Path) -> None:
    table = lepton.table(stored(tmp_path / "t", KINDS, old_rows(), LEGACY))
    found = table.to_arrow()

    assert found["d"].to_pylist() == DATES
    times: list[Any] = found["t"].to_pylist()
    assert [t and t.replace(tzinfo=None) for t in times] == [
        d and dt.datetime(d.year, d.month, d.day, 0, 0, 0, 1) for d in DATES
    ]
    assert table.where("d = '1500-12-31'").to_arrow()["x"].to_pylist() == [2]
    assert table.where("d < '1500-12-31'").count_rows() == 1


def test_times_of_a_local_zone_are_read_since_1900_and_refused_before(tmp_path: Path) -> None:
    zone = LEGACY | {b"org.apache.spark.timeZone": b"Europe/Amsterdam"}
    table = lepton.table(stored(tmp_path / "t", KINDS, old_rows(), zone))
    assert table.select(["d"]).to_arrow()["d"].to_pylist() == DATES
    with pytest.raises(LakeError, match=r"a\.parquet.*times from before 1900"):
        table.to_arrow()
    new = lepton.table(stored(tmp_path / "u", KINDS, old_rows().slice(4), zone))
    assert new.to_arrow()["d"].to_pylist() == DATES[4:]


@pytest.mark.parametrize("since", [0, 3])
def test_old_days_inside_other_values_are_refused(tmp_path: Path, since: int) -> None:
    rows = old_rows().slice(since)
    values = rows["d"].combine_chunks()
    lists = pa.table({"l": pa.ListArray.from_arrays(pa.array([0, len(values)]), values)})
    table = lepton.table(stored(tmp_path / "t", {"l": array_of("date")}, lists, LEGACY))
    if since:
        assert table.to_arrow()["l"].to_pylist() == [DATES[since:]]
        return
    with pytest.raises(LakeError, match="days from before 1582 inside other values"):
        table.to_arrow()
