"""Time travel: the version that was current then, by the times that the protocol trusts."""

import datetime as dt
import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

import lepton
from benchmarks.conformance_log import Log, column, metadata, protocol
from benchmarks.conformance_tables import table_of
from lepton.errors import LakeError

DAY = 86_400
COPIED = 1_700_000_000


def log_of(root: Path, stamped_from: int | None) -> Path:
    """Five commits a day apart; all their files were copied, the last first."""
    log = Log(root)
    for n in range(5):
        add = log.add(f"{n}.parquet", table_of({"x": pa.int64()}, x=[n]))
        log.commit(*([protocol(reader=1, writer=2)] if n == 0 else []), add)
        actions = [json.loads(x) for x in commit(root, n).read_text().splitlines()]
        if n == (stamped_from or 0):
            made = metadata([column("x", "long")])
            if stamped_from is not None:
                made["metaData"]["configuration"] = {"delta.enableInCommitTimestamps": "true"} | (
                    {"delta.inCommitTimestampEnablementVersion": str(n)} if n else {}
                )
            actions.append(made)
        elif n == 0:
            actions.append(metadata([column("x", "long")]))
        if stamped_from is not None and n >= stamped_from:
            actions[0]["commitInfo"]["inCommitTimestamp"] = n * DAY * 1000
        commit(root, n).write_text("".join(json.dumps(a) + "\n" for a in actions))
        at = n * DAY if stamped_from and n < stamped_from else COPIED - n
        os.utime(commit(root, n), (at, at))
    return root


def commit(root: Path, number: int) -> Path:
    return root / "_delta_log" / f"{number:020}.json"


def at(root: Path, seconds: float) -> int:
    return lepton.table(root, version=dt.datetime.fromtimestamp(seconds, dt.UTC)).version


@pytest.mark.parametrize("since", [0, 2])
def test_timestamps_inside_commits_count_where_the_table_keeps_them(
    tmp_path: Path, since: int
) -> None:
    root = log_of(tmp_path / "t", since)

    assert [at(root, n * DAY) for n in range(5)] == [0, 1, 2, 3, 4]
    assert at(root, 1.5 * DAY) == 1
    assert at(root, COPIED) == 4
    with pytest.raises(LakeError, match=r"no version of 1969.*log begins at 1970-01-01"):
        at(root, -1)


def test_elsewhere_the_files_times_count_made_ascending(tmp_path: Path) -> None:
    root = log_of(tmp_path / "t", None)

    assert at(root, COPIED) == 0  # the others follow it, a millisecond apart
    assert at(root, COPIED + 0.0025) == 2
    assert at(root, COPIED + 1) == 4
    zoned = dt.datetime.fromtimestamp(COPIED, dt.timezone(dt.timedelta(hours=5)))
    plain = zoned.astimezone(dt.UTC).replace(tzinfo=None)
    assert {lepton.table(root, version=v).version for v in (zoned, plain)} == {0}
    with pytest.raises(LakeError, match="no version of 2000"):
        lepton.table(root, version=dt.datetime(2000, 1, 1))


def test_a_lost_stamp_is_named(tmp_path: Path) -> None:
    root = log_of(tmp_path / "t", 0)
    commit(root, 2).write_text("")
    with pytest.raises(LakeError, match="2"):
        at(root, 3 * DAY)


@pytest.mark.parametrize("version", [True, "2020-01-01", 1.5])
def test_what_is_no_version_is_refused(tmp_path: Path, version: object) -> None:
    lepton.write(pa.table({"x": [1]}), tmp_path / "t")
    with pytest.raises(TypeError, match="a number or a datetime"):
        lepton.table(tmp_path / "t", version=version)  # type: ignore[arg-type]
