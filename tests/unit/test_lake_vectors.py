"""Deletion vectors: every storage and container, by deltalake's own masks; damage is refused."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from hypothesis import given, settings
from hypothesis import strategies as st

import lepton
from benchmarks.conformance_log import Action, Log, column, metadata, protocol, removed
from benchmarks.conformance_vectors import bitmap, vectored
from lepton.errors import LakeError
from lepton.lake.deletions import deleted_of
from lepton.lake.log import load_version
from lepton.lake.vectors import Vector, deleted_rows, file_of, framed, from_z85, inline, vector_of

TABLES = Path(__file__).parents[1] / "data" / "delta-tables"
WITH_VECTORS = ["dv-partitioned-with-checkpoint", "dv-with-columnmapping"]


@st.composite
def rows(draw: st.DrawFn, highest: int = 2**33) -> list[int]:
    """Some rows: alone, in runs, and so dense that a container is a set of bits."""
    alone = draw(st.sets(st.integers(0, highest), max_size=40))
    spans = draw(st.lists(st.tuples(st.integers(0, highest), st.integers(1, 9000)), max_size=4))
    steps = draw(st.integers(1, 3))
    for first, length in spans:
        alone |= set(range(first, first + length, steps))
    return sorted(alone)


def named(data: bytes, count: int) -> Vector:
    return Vector(storage="u", place="", offset=1, size=len(data), deleted=count)


@given(rows(), st.booleans())
def test_a_bitmap_comes_back_as_it_was(wanted: list[int], runs: bool) -> None:
    data = bitmap(wanted, runs=runs)

    assert deleted_rows(named(data, len(wanted)), data).tolist() == wanted


@given(rows(), st.booleans(), st.data())
def test_a_vector_that_is_cut_or_longer_is_refused(
    wanted: list[int], runs: bool, data: st.DataObject
) -> None:
    whole = bitmap(wanted, runs=runs)
    cut = data.draw(st.integers(0, len(whole) - 1))
    for damaged in (whole[:cut], whole + b"\0"):
        with pytest.raises(ValueError, match=r"\w"):
            deleted_rows(named(damaged, len(wanted)), damaged)


@given(st.binary(max_size=300), st.integers(0, 20))
def test_no_bytes_at_all_bring_anything_but_rows_or_refusal(data: bytes, count: int) -> None:
    for given_bytes in (data, bitmap([1])[:12] + data):
        try:
            found = deleted_rows(named(given_bytes, count), given_bytes)
        except ValueError:
            continue
        assert len(found) == count


def test_what_the_log_says_must_be_whole() -> None:
    with pytest.raises(ValueError, match="not whole"):
        vector_of({"storageType": "u"})
    with pytest.raises(ValueError, match="not known"):
        file_of(Vector("z", "x", None, 1, 1))
    with pytest.raises(ValueError, match="multiple of 5"):
        from_z85("abc")
    with pytest.raises(ValueError, match="base 85"):
        from_z85("~~~~~")
    with pytest.raises(ValueError, match="4 bytes inline, not 9"):
        inline(Vector("i", "00000", None, 9, 0))
    with pytest.raises(ValueError, match="too early"):
        framed(Vector("u", "", 1, 9, 0), b"short")


def masks(uri: Path) -> dict[str, list[int]]:
    """Deleted rows by file name, as deltalake tells them."""
    found: dict[str, list[int]] = {}
    for batch in pa.RecordBatchReader.from_stream(DeltaTable(uri).deletion_vectors()):
        for path, mask in zip(batch["filepath"], batch["selection_vector"], strict=True):
            gone = np.flatnonzero(~np.asarray(mask.as_py(), bool)).tolist()
            found[str(path.as_py()).rpartition("/")[2]] = gone
    return found


def ours(uri: Path) -> dict[str, list[int]]:
    load_version.cache_clear()
    version = lepton.table(uri).load()
    return {
        f.path.rpartition("/")[2]: deleted_of(version, f, f.rows or 2**40).tolist()
        for f in version.files
        if f.vector
    }


@settings(max_examples=10, deadline=None)
@given(st.lists(rows(2**18), min_size=4, max_size=4), st.booleans())
def test_every_storage_reads_as_deltalake_reads_it(
    tmp_path_factory: pytest.TempPathFactory, wanted: list[list[int]], runs: bool
) -> None:
    root = tmp_path_factory.mktemp("t") / "t"
    log = Log(root)
    add = log.add("0.parquet", pa.table({"x": [1]}), stats={})["add"]
    some = {"stats": json.dumps({"numRecords": 2**18 + 9000})}
    adds = [
        vectored({"add": add | some | {"path": f"{n}.parquet"}}, gone or [1], root, kind, runs=runs)
        for n, (gone, kind) in enumerate(zip(wanted, "upii", strict=True))
    ]
    log.commit(protocol(["deletionVectors"]), metadata([column("x", "long")]), *adds)

    assert ours(root) == masks(root)
    counts = sum(len(gone or [1]) for gone in wanted)
    assert lepton.table(root).count_rows() == 4 * (2**18 + 9000) - counts


@pytest.mark.parametrize("name", WITH_VECTORS)
def test_public_tables_read_as_deltalake_reads_them(tmp_path: Path, name: str) -> None:
    root = shutil.copytree(TABLES / name / "table", tmp_path / "t")

    assert ours(root) == masks(root)
    assert ours(root)


def two_files(root: Path) -> tuple[Log, Action, Action]:
    log = Log(root)
    one, two = (
        log.add(f"{n} é.parquet", pa.table({"x": np.arange(10) + 10 * n}), stats={}) for n in (0, 1)
    )
    columns = metadata([column("x", "long")])
    log.commit(protocol(["deletionVectors"]), columns, one, vectored(two, [1, 2], root))
    return log, one, two


def xs(root: Path) -> list[int]:
    load_version.cache_clear()
    return sorted(lepton.table(root).to_arrow()["x"].to_pylist())


def test_vectors_come_and_go_across_checkpoints_and_compacted_commits(tmp_path: Path) -> None:
    root = tmp_path / "t"
    log, one, first = two_files(root)
    lines = (root / "_delta_log" / f"{0:020}.json").read_text().splitlines()
    two = json.loads(lines[-1])
    every = set(range(20))
    assert xs(root) == sorted(every - {11, 12})
    DeltaTable(root).create_checkpoint()
    assert xs(root) == sorted(every - {11, 12})
    three = vectored(dict(one), [3], root, "i")
    log.commit(removed(one), three)
    assert xs(root) == sorted(every - {11, 12, 3})
    log.commit(removed(two), dict(first))  # its rows come back
    assert xs(root) == sorted(every - {3})
    DeltaTable(root).create_checkpoint()
    assert xs(root) == sorted(every - {3})
    log.commit(removed(three))
    assert xs(root) == list(range(10, 20))
    log.commit(removed(first), vectored(dict(first), [0, 9], root, "p", runs=True))
    folder = root / "_delta_log"
    joined = b"".join((folder / f"{n:020}.json").read_bytes() for n in (3, 4))
    (folder / f"{3:020}.{4:020}.compacted.json").write_bytes(joined)
    assert xs(root) == list(range(11, 19))
    assert sorted(lepton.table(root, version=2).to_arrow()["x"].to_pylist()) == sorted(every - {3})


def test_opening_reads_no_vector_and_only_its_own_file_is_lost_with_one(tmp_path: Path) -> None:
    root = tmp_path / "t"
    two_files(root)
    for file in root.rglob("*.bin"):
        file.unlink()
    load_version.cache_clear()
    table = lepton.table(root)

    assert table.count_rows() == 18
    assert len(table.read_file(table.files()[0])) == 10
    with pytest.raises(LakeError, match=r"deletion_vector_.*1 é\.parquet.*t'@0.*restore"):
        table.to_arrow()


def test_a_vector_for_rows_that_are_not_there_is_refused(tmp_path: Path) -> None:
    log, one, _ = two_files(tmp_path / "t")
    log.commit(removed(one), vectored(dict(one), [10], tmp_path / "t"))
    with pytest.raises(LakeError, match=r"0 é\.parquet.*t'@1 deletes row 10, and the file has 10"):
        xs(tmp_path / "t")


def test_a_file_that_is_listed_with_two_vectors_is_refused(tmp_path: Path) -> None:
    log, one, _ = two_files(tmp_path / "t")
    log.commit(vectored(dict(one), [1], tmp_path / "t"))
    with pytest.raises(LakeError, match=r"t'@1 lists .*0 é\.parquet.* twice"):
        xs(tmp_path / "t")


def test_every_flipped_bit_of_a_vectors_file_is_caught_or_harmless(tmp_path: Path) -> None:
    root = tmp_path / "t"
    two_files(root)
    (file,) = root.rglob("*.bin")
    whole = file.read_bytes()
    chance = random.Random(3)
    begin = len(b"\x01another vector")
    table = lepton.table(root)
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[chance.randrange(begin, len(whole))] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(LakeError, match=file.name):
            table.to_arrow()


def test_a_vectors_place_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "t"
    two_files(root)
    log = root / "_delta_log" / f"{0:020}.json"
    log.write_text(log.read_text().replace('"storageType": "u"', '"storageType": "q"'))
    load_version.cache_clear()
    with pytest.raises(LakeError, match=r"deletion vector.*t'@0"):
        lepton.table(root).to_arrow()


def as_parts(folder: Path, whole: pa.Table, actions: list[Action]) -> None:
    for n, part in enumerate((whole.slice(0, 2), whole.slice(2)), 1):
        pq.write_table(part, folder / f"{0:020}.checkpoint.{n:010}.{2:010}.parquet")


def as_sidecar(folder: Path, whole: pa.Table) -> Action:
    adds = whole.filter(pc.is_valid(whole["add"])).select(["add"])
    (folder / "_sidecars").mkdir()
    file = folder / "_sidecars" / "one.parquet"
    pq.write_table(adds, file)
    size = file.stat().st_size
    return {"sidecar": {"path": file.name, "sizeInBytes": size, "modificationTime": 1}}


def as_json(folder: Path, whole: pa.Table, actions: list[Action]) -> None:
    lines = [{"checkpointMetadata": {"version": 0}}, *actions, as_sidecar(folder, whole)]
    name = f"{0:020}.checkpoint.80a083e8-7026-4e79-81be-64bd76c43a11.json"
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def as_parquet(folder: Path, whole: pa.Table, actions: list[Action]) -> None:
    beside = as_sidecar(folder, whole)
    others = pc.is_null(whole["add"])
    blank = whole.filter(pc.invert(others)).slice(0, 2).drop_columns("add")
    table = pa.concat_tables([whole.filter(others).drop_columns("add"), blank])
    table = table.drop_columns(
        [n for n in ("checkpointMetadata", "sidecar") if n in table.schema.names]
    )
    none = [None] * (len(table) - 2)
    described = {"version": 0}
    table = table.append_column("checkpointMetadata", pa.array([*none, described, None]))
    table = table.append_column("sidecar", pa.array([*none, None, beside["sidecar"]]))
    name = f"{0:020}.checkpoint.80a083e8-7026-4e79-81be-64bd76c43a11.parquet"
    pq.write_table(table, folder / name)


@pytest.mark.parametrize("write", [as_parts, as_json, as_parquet])
def test_vectors_in_every_kind_of_checkpoint(tmp_path: Path, write: Any) -> None:
    root = tmp_path / "t"
    log = Log(root)
    one, two = (log.add(f"{n}.parquet", pa.table({"x": np.arange(10)}), stats={}) for n in (1, 2))
    features = protocol(["deletionVectors", "v2Checkpoint"])
    columns = metadata([column("x", "long")])
    log.commit(features, columns, vectored(one, [3, 4], root), two)
    log.commit(log.add("3.parquet", pa.table({"x": np.arange(10)}), stats={}))
    folder = root / "_delta_log"
    DeltaTable(root, version=0).create_checkpoint()
    first = folder / f"{0:020}.checkpoint.parquet"
    whole = pq.read_table(first)
    for old in (first, folder / "_last_checkpoint", folder / f"{0:020}.json"):
        old.unlink(missing_ok=True)
    write(folder, whole, [features, columns])

    assert ours(root) == masks(root) == {"1.parquet": [3, 4]}
    assert lepton.table(root).count_rows() == 28
