"""Writers killed where they stand: every version holds whole commits, each of them once."""

import random
from pathlib import Path

from deltalake import DeltaTable

import lepton
from benchmarks.lake_writers import Crowd, kill_at_random, rows_after
from lepton.lake.maintenance import vacuum

WRITERS = ("append", "merge", "swap", "optimize")


def test_the_rows_follow_from_the_steps() -> None:
    assert rows_after("append", 0) == rows_after("merge", 0) == rows_after("swap", 0) == []
    assert rows_after("append", 2)[2:4] == [("append", 2, 1), ("append", 3, 2)]
    assert rows_after("merge", 2) == [("merge", 0, 1), ("merge", 1, 2), ("merge", 2, 2)]
    assert rows_after("swap", 7)[0] == ("swap", 0, 7)


def test_killed_writers_leave_whole_commits_and_go_on_from_there(tmp_path: Path) -> None:
    uri = str(tmp_path / "t")
    with Crowd(uri, WRITERS, {}) as crowd:
        steps = kill_at_random(crowd, 10, random.Random(11), 0.3)
        writing = [n for n in WRITERS if n != "optimize"]
        crowd.finish({n: steps[n] + 2 for n in writing})
        crowd.steps()
    keep_nothing = {"delta.deletedFileRetentionDuration": "interval 0 hours"}
    DeltaTable(uri).alter.set_table_properties(keep_nothing)
    live = {f.path for f in lepton.table(uri).files()}
    rows = lepton.table(uri).to_arrow()
    vacuum(uri, dry_run=False)

    assert {p.name for p in Path(uri).glob("*.parquet")} == live
    assert lepton.table(uri).to_arrow().equals(rows)
