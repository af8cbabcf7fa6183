"""A damaged log is refused by name, before any row is read."""

from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

import lepton
from lepton.errors import LakeError


def written(path: Path, commits: int) -> Path:
    for n in range(commits):
        lepton.write(pa.table({"x": [n]}), path)
    return path / "_delta_log"


def test_a_gap_is_refused_unless_a_checkpoint_spans_it(tmp_path: Path) -> None:
    log = written(tmp_path / "t", 4)
    DeltaTable(tmp_path / "t", version=2).create_checkpoint()
    (log / f"{1:020}.json").unlink()

    assert lepton.table(tmp_path / "t").count_rows() == 4
    with pytest.raises(LakeError, match=rf"{tmp_path}/t.*@1.*|version 1"):
        lepton.table(tmp_path / "t", version=1)


def test_a_lost_commit_is_named(tmp_path: Path) -> None:
    log = written(tmp_path / "t", 3)
    (log / f"{1:020}.json").unlink()

    with pytest.raises(LakeError, match=rf"{tmp_path}/t.*{1:020}\.json"):
        lepton.table(tmp_path / "t")


def test_a_cut_off_checkpoint_names_table_and_file(tmp_path: Path) -> None:
    log = written(tmp_path / "t", 2)
    DeltaTable(tmp_path / "t").create_checkpoint()
    checkpoint = log / f"{1:020}.checkpoint.parquet"
    checkpoint.write_bytes(checkpoint.read_bytes()[:50])
    (log / f"{0:020}.json").unlink()

    with pytest.raises(
        LakeError, match=rf"{tmp_path}/t.*checkpoint.parquet: if that file is cut off"
    ):
        lepton.table(tmp_path / "t")


def test_a_folder_without_a_log_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("x\n1\n")
    with pytest.raises(LakeError, match=rf"no Delta table at .*{tmp_path}"):
        lepton.table(tmp_path)


def test_history_survives_a_commit_without_info(tmp_path: Path) -> None:
    log = written(tmp_path / "t", 3)
    middle = log / f"{1:020}.json"
    lines = [line for line in middle.read_text().splitlines() if "commitInfo" not in line]
    middle.write_text("\n".join(lines) + "\n")

    found = lepton.table(tmp_path / "t").history()
    assert [(c.version, c.operation) for c in found] == [(2, "WRITE"), (1, ""), (0, "CREATE TABLE")]


def test_a_lost_first_commit_is_named(tmp_path: Path) -> None:
    log = written(tmp_path / "t", 3)
    (log / f"{0:020}.json").unlink()

    with pytest.raises(LakeError, match=rf"{tmp_path}/t.*{0:020}\.json"):
        lepton.table(tmp_path / "t")


def test_a_column_of_an_unknown_type_names_the_table(tmp_path: Path) -> None:
    write_deltalake(tmp_path / "t", pa.table({"x": [1]}))
    log = tmp_path / "t" / "_delta_log" / f"{0:020}.json"
    text = log.read_text()
    assert '\\"long\\"' in text
    log.write_text(text.replace('\\"long\\"', '\\"void\\"'))

    with pytest.raises(LakeError, match=rf"{tmp_path}/t"):
        lepton.table(tmp_path / "t")
