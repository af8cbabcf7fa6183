"""Damaged tables: an error that names table, version and file, or the very same rows."""

import datetime as dt
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

import lepton
from benchmarks.conformance_log import Log, column, metadata, protocol
from lepton.errors import LakeError
from lepton.lake.log import load_version
from lepton.lake.read import unchecked_files

VECTORS = Path(__file__).parents[1] / "data/delta-tables/dv-partitioned-with-checkpoint/table"
ROWS = pa.table(
    {
        "x": np.arange(400),
        "word": [f"word {i % 7}" for i in range(400)],
        "part": ["a", "b"] * 200,
    }
)


def written(path: Path) -> tuple[str, Path]:
    """A table of one file, and that file."""
    lepton.write(ROWS, path)
    return str(path), next(path.glob("*.parquet"))


def checked(file: Path) -> None:
    """Write the file anew, with page checksums."""
    pq.write_table(pq.read_table(file), file, write_page_checksum=True)


def refused(uri: str, name: str) -> str:
    load_version.cache_clear()
    with pytest.raises(LakeError) as caught:
        lepton.table(uri).to_arrow()
    told = str(caught.value)
    assert uri in told
    assert name in told
    assert any(word in told for word in ("restore", "put the file back", "read a newer version"))
    return told


def test_a_missing_data_file(tmp_path: Path) -> None:
    uri, file = written(tmp_path / "t")
    file.unlink()
    assert "@0" in refused(uri, file.name)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_a_data_file_cut_off(tmp_path: Path, part: float) -> None:
    uri, file = written(tmp_path / "t")
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * part)])
    assert "@0" in refused(uri, file.name)


@pytest.mark.parametrize(
    "other",
    [
        pa.table({"x": ["no number"] * 400, "word": ["w"] * 400, "part": ["a"] * 400}),
        pa.table({"x": [[1]] * 400, "word": ["w"] * 400, "part": ["a"] * 400}),
    ],
)
def test_a_data_file_of_another_schema(tmp_path: Path, other: pa.Table) -> None:
    uri, file = written(tmp_path / "t")
    pq.write_table(other, file)
    assert "@0" in refused(uri, file.name)


@pytest.mark.parametrize(
    ("stored", "declared"),
    [
        (pa.array([0.1]), "float"),
        (pa.array([2**53 + 1]), "double"),
        (pa.array(["1"]), "long"),
        (pa.array([1]), "string"),
        (pa.array([dt.datetime(2020, 1, 1, 5)], pa.timestamp("us")), "date"),
        (pa.array([dt.date(2020, 1, 1)]), "timestamp"),
        (pa.array([[1]]), {"type": "struct", "fields": [column("x", "long")]}),
        (pa.array([1]), {"type": "array", "elementType": "long", "containsNull": True}),
    ],
)
def test_a_type_that_the_column_cannot_have_come_from_is_refused(
    tmp_path: Path, stored: Any, declared: Any
) -> None:
    log = Log(tmp_path / "t")
    columns = metadata([column("c", declared)])
    log.commit(protocol(reader=1, writer=2), columns, log.add("1.parquet", pa.table({"c": stored})))
    assert "@0" in refused(str(tmp_path / "t"), "1.parquet")


def test_a_file_with_other_rows_than_the_log_says(tmp_path: Path) -> None:
    uri, file = written(tmp_path / "t")
    pq.write_table(pq.read_table(file).slice(1), file)
    assert "399 rows, and the log says 400" in refused(uri, file.name)


def test_a_column_that_differs_by_case_is_found_or_refused(tmp_path: Path) -> None:
    log = Log(tmp_path / "t")
    rows = pa.table({"word": [7]})
    add = log.add("1.parquet", rows)
    log.commit(protocol(reader=1, writer=2), metadata([column("Word", "long")]), add)
    assert lepton.table(tmp_path / "t").to_arrow().to_pylist() == [{"Word": 7}]
    log.commit(log.add("2.parquet", rows.append_column("WORD", pa.array([8]))))
    assert "word, WORD" in refused(str(tmp_path / "t"), "2.parquet")


def test_a_column_by_the_name_of_the_positions_is_refused(tmp_path: Path) -> None:
    log = Log(tmp_path / "t")
    log.commit(protocol(reader=1, writer=2), metadata([column("__position__", "long")]))
    with pytest.raises(LakeError, match=r"@0 has a column __position__.*rename it"):
        lepton.table(tmp_path / "t")


def test_a_missing_deletion_vector(tmp_path: Path) -> None:
    uri = str(shutil.copytree(VECTORS, tmp_path / "t"))
    for vector in Path(uri).rglob("*.bin"):
        vector.unlink()
    assert "@15" in refused(uri, "deletion_vector")


def test_a_gap_in_the_log(tmp_path: Path) -> None:
    uri, _ = written(tmp_path / "t")
    lepton.write(ROWS, uri)
    lepton.write(ROWS, uri)
    Path(uri, "_delta_log", f"{1:020}.json").unlink()
    assert "@2" in refused(uri, f"{1:020}.json")


def test_commits_that_are_empty_or_cut_off_are_named(tmp_path: Path) -> None:
    uri, _ = written(tmp_path / "t")
    for _ in range(2):
        write_deltalake(uri, ROWS, mode="append")
    commit = Path(uri, "_delta_log", f"{1:020}.json")
    whole = commit.read_text()
    commit.write_text(whole[: len(whole) // 2])
    refused(uri, commit.name)
    commit.write_text("")
    assert "empty" in refused(uri, commit.name)


def test_a_part_of_a_checkpoint_that_is_lost_makes_it_none(tmp_path: Path) -> None:
    uri, _ = written(tmp_path / "t")
    lepton.write(ROWS, uri)
    DeltaTable(uri).create_checkpoint()
    log = Path(uri, "_delta_log")
    (log / f"{1:020}.checkpoint.parquet").rename(
        log / f"{1:020}.checkpoint.{1:010}.{2:010}.parquet"
    )
    (log / "_last_checkpoint").unlink()
    (log / f"{0:020}.json").unlink()
    assert "gap" in refused(uri, f"{0:020}.json")


def test_a_checkpoint_cut_off_without_its_commits(tmp_path: Path) -> None:
    uri, _ = written(tmp_path / "t")
    lepton.write(ROWS, uri)
    DeltaTable(uri).create_checkpoint()
    Path(uri, "_delta_log", f"{0:020}.json").unlink()
    point = next(Path(uri, "_delta_log").glob("*.checkpoint.parquet"))
    point.write_bytes(point.read_bytes()[: point.stat().st_size // 2])
    refused(uri, point.name)


def test_every_flipped_byte_is_caught_or_harmless(tmp_path: Path) -> None:
    uri, file = written(tmp_path / "t")
    checked(file)
    whole = file.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    chance = random.Random(7)
    table = lepton.table(uri)
    told: list[str] = []
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[chance.randrange(4, len(whole) - footer)] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        try:
            assert table.to_arrow().equals(ROWS)
        except LakeError as e:
            told.append(str(e))
    assert told
    assert all(file.name in t and f"{uri!r}@0" in t for t in told)


def test_files_without_checksums_are_named(tmp_path: Path) -> None:
    uri, file = written(tmp_path / "t")
    checked(file)
    version = lepton.table(uri).load()
    assert unchecked_files(version) == ()
    for options in ({}, {"use_dictionary": False}, {"data_page_version": "2.0"}):
        pq.write_table(ROWS, file, **options)
        assert unchecked_files(version) == (file.name,)
        pq.write_table(ROWS, file, write_page_checksum=True, **options)
        assert unchecked_files(version) == ()


def lost(uri: Path) -> str:
    file = next(uri.glob("*.parquet"))
    file.unlink()
    return file.name


def cut(uri: Path) -> str:
    file = next(uri.glob("*.parquet"))
    file.write_bytes(file.read_bytes()[:100])
    return file.name


def other(uri: Path) -> str:
    file = next(uri.glob("*.parquet"))
    pq.write_table(pa.table({"x": ["a"] * 400, "word": ["b"] * 400, "part": ["c"] * 400}), file)
    return file.name


def gap(uri: Path) -> str:
    write_deltalake(uri, ROWS, mode="append")
    commit = uri / "_delta_log" / f"{1:020}.json"
    commit.unlink()
    return commit.name


def torn(uri: Path) -> str:
    commit = uri / "_delta_log" / f"{1:020}.json"
    commit.write_text(commit.read_text()[:90])
    return commit.name


def pointless(uri: Path) -> str:
    DeltaTable(uri).create_checkpoint()
    (uri / "_delta_log" / f"{0:020}.json").unlink()
    point = uri / "_delta_log" / f"{1:020}.checkpoint.parquet"
    point.write_bytes(point.read_bytes()[:200])
    return point.name


WAYS: list[dict[str, Any]] = [
    {"mode": "merge", "key": "x"},
    {"mode": "delete", "key": "x"},
    {"mode": "replace_where", "where": "x < 400 AND word <> 'q'"},
]


@pytest.mark.parametrize("feed", [False, True], ids=["ours", "deltalake's"])
@pytest.mark.parametrize("how", WAYS, ids=[w["mode"] for w in WAYS])
@pytest.mark.parametrize("damage", [lost, cut, other, gap, torn, pointless])
def test_a_change_of_a_damaged_table_names_the_file_and_leaves_all_as_it_was(
    tmp_path: Path, damage: Any, how: dict[str, Any], feed: bool
) -> None:
    uri = tmp_path / "t"
    kept = {"delta.enableChangeDataFeed": "true"} if feed else None
    for _ in range(2):
        write_deltalake(uri, ROWS, mode="append", configuration=kept)
    name = damage(uri)
    load_version.cache_clear()
    before = {p: p.read_bytes() for p in uri.rglob("*") if p.is_file()}
    with pytest.raises(LakeError) as caught:
        lepton.write(ROWS.slice(0, 300), uri, **how)

    told = str(caught.value)
    assert name in told
    assert f"{uri}'@" in told
    assert {p: p.read_bytes() for p in uri.rglob("*") if p.is_file()} == before
