"""Processes that write at once lose nothing and write nothing twice."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest

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

DOUBLES = """
import json, os, sys
import pyarrow as pa
import lepton
from lepton.errors import ConflictError

uri, writers, batches, options = sys.argv[1], *map(int, sys.argv[2:4]), json.loads(sys.argv[4])

def write():
    for batch in range(1, batches + 1):
        rows = pa.table({"batch": [batch] * 3, "row": [0, 1, 2]})
        while True:
            try:
                lepton.write(rows, uri, txn=("job", batch), storage_options=options)
                break
            except ConflictError:  # to be tried again, which counts once
                pass

begin, begun = os.pipe()
children = []
for _ in range(writers):
    child = os.fork()
    if child == 0:
        os.close(begun)
        os.read(begin, 1)  # until the last one is there
        code = 1
        try:
            write()
            code = 0
        except BaseException as e:
            print(f"{type(e).__name__}: {e}", flush=True)
        os._exit(code)
    children.append(child)
os.close(begun)
codes = [os.waitpid(child, 0)[1] for child in children]
sys.exit(any(codes))
"""


def doubled(uri: str, writers: int, batches: int, options: Mapping[str, str]) -> None:
    """Let many processes write the same numbered batches at once, into a table that is not there.

    They are forked by one that has imported all, so that they start together.
    """
    command = [sys.executable, "-c", DOUBLES, uri, str(writers), str(batches), json.dumps(options)]
    made = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        told, _ = made.communicate(timeout=240)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(made.pid, signal.SIGKILL)
    assert made.returncode == 0, told
    snapshot = lepton.table(uri, storage_options=options)
    rows = sorted(zip(*snapshot.to_arrow().to_pydict().values(), strict=True))

    assert rows == [(batch, row) for batch in range(1, batches + 1) for row in range(3)]
    assert [c.version for c in snapshot.history()] == [*range(batches - 1, -1, -1)]


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


def test_sixteen_doubles_of_a_writer_land_each_batch_once(tmp_path: Path) -> None:
    doubled(str(tmp_path / "t"), 16, 4, {})

    assert len(list((tmp_path / "t").glob("*.parquet"))) == 4


@pytest.mark.usefixtures("endpoint")
def test_doubles_of_a_writer_land_each_batch_once_on_s3(options: dict[str, str]) -> None:
    doubled("s3://lake/doubles", 6, 2, options)
