"""Processes that write at once lose nothing and write nothing twice."""

import subprocess
import sys
from pathlib import Path

import lepton

WRITER = """
import sys, pyarrow as pa, lepton
uri, n, txn = sys.argv[1], int(sys.argv[2]), sys.argv[3]
lepton.write(pa.table({"x": [n]}), uri, txn=(txn, 1))
lepton.write(pa.table({"x": [n + 100]}), uri, txn=(txn + "-more", 1))
"""

MERGER = """
import sys, pyarrow as pa, lepton
uri, n = sys.argv[1], int(sys.argv[2])
for key in (n, n + 100):
    rows = pa.table({"x": [key, 1000], "by": [n, n]})
    lepton.write(rows, uri, mode="merge", key="x")
"""


def race(uri: Path, names: list[str], program: str = WRITER) -> list[int]:
    made = [
        subprocess.Popen([sys.executable, "-c", program, str(uri), str(n), name])
        for n, name in enumerate(names)
    ]
    assert [p.wait(60) for p in made] == [0] * len(names)
    rows: list[int] = lepton.table(uri).to_arrow()["x"].to_pylist()
    return sorted(rows)


def test_one_transaction_from_many_processes_counts_once(tmp_path: Path) -> None:
    rows = race(tmp_path / "t", ["job"] * 6)

    assert len(rows) == 2
    assert len(list((tmp_path / "t").glob("*.parquet"))) == 2


def test_appends_at_once_all_land(tmp_path: Path) -> None:
    rows = race(tmp_path / "t", [f"job{n}" for n in range(6)])

    assert rows == [*range(6), *range(100, 106)]


def test_merges_at_once_all_land_and_no_key_is_there_twice(tmp_path: Path) -> None:
    rows = race(tmp_path / "t", [f"job{n}" for n in range(4)], MERGER)

    assert rows == [*range(4), *range(100, 104), 1000]
