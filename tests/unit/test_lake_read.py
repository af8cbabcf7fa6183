"""Every conformance table is read exactly, whole and in pieces; what cannot be read is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lepton
from benchmarks.conformance_log import Log, column, metadata, protocol
from lepton.errors import LakeError
from lepton.lake.read import POSITION

TABLES = Path(__file__).parents[1] / "data" / "delta-tables"
INDEX: list[dict[str, Any]] = json.loads((TABLES / "index.json").read_text())


def rows(table: pa.Table) -> list[str]:
    return sorted(map(repr, table.to_pylist()))


@pytest.mark.parametrize("case", INDEX, ids=[c["name"] for c in INDEX])
def test_a_conformance_table_is_read_exactly(case: dict[str, Any]) -> None:
    snapshot = lepton.table(TABLES / case["table"])
    expected = pq.read_table(TABLES / case["expected"])

    assert rows(snapshot.select(expected.column_names).to_arrow()) == rows(expected)
    assert snapshot.count_rows() == case["expected_rows"] == len(expected)


@pytest.mark.parametrize("case", INDEX, ids=[c["name"] for c in INDEX])
def test_row_ranges_add_up_to_the_file(case: dict[str, Any]) -> None:
    snapshot = lepton.table(TABLES / case["table"])
    for file in snapshot.files()[:4]:
        whole = snapshot.read_file(file)
        end = (file.rows or 300) + 1
        pieces = [snapshot.read_file(file, start=s, stop=s + 3) for s in range(0, end, 3)]

        assert pa.concat_tables(pieces).to_pylist() == whole.to_pylist()
        assert whole[POSITION].to_pylist() == sorted(whole[POSITION].to_pylist())


def test_an_older_version_stays_as_it_was(tmp_path: Path) -> None:
    lepton.write(pa.table({"x": [1, 2]}), tmp_path / "t")
    lepton.write(pa.table({"x": [3]}), tmp_path / "t")

    assert lepton.table(tmp_path / "t", version=0).to_arrow()["x"].to_pylist() == [1, 2]
    assert lepton.table(tmp_path / "t").version == 1
    assert lepton.table(tmp_path / "t").changes(0).to_pylist() == [
        {"x": 3, "_change_type": "insert", "_commit_version": 1}
    ]


def test_no_table_no_version_no_column(tmp_path: Path) -> None:
    with pytest.raises(LakeError, match=r"no Delta table at .*nothing.*lepton\.write"):
        lepton.table(tmp_path / "nothing")
    lepton.write(pa.table({"x": [1]}), tmp_path / "t")
    with pytest.raises(LakeError, match="has no version 7: versions 0 to 0 exist"):
        lepton.table(tmp_path / "t", version=7)
    with pytest.raises(LakeError, match="has no column y; it has: x"):
        lepton.table(tmp_path / "t").select(["y"])
    with pytest.raises(LakeError, match="does not fit the table"):
        lepton.table(tmp_path / "t").where("y > 1")


def test_an_empty_table_has_a_schema_and_no_rows(tmp_path: Path) -> None:
    empty = lepton.write(pa.table({"x": pa.array([], pa.int64())}), tmp_path / "t")

    assert empty.to_arrow().schema.names == ["x"]
    assert empty.count_rows() == 0
    with pytest.raises(LakeError, match="has no rows"):
        empty.stream(batch_size=1, lanes=1).order(0)


def test_an_unknown_reader_feature_is_refused_by_name(tmp_path: Path) -> None:
    lepton.write(pa.table({"x": [1]}), tmp_path / "t")
    protocol = {
        "protocol": {
            "minReaderVersion": 3,
            "minWriterVersion": 7,
            "readerFeatures": ["variantType"],
            "writerFeatures": ["variantType"],
        }
    }
    log = tmp_path / "t" / "_delta_log" / "00000000000000000001.json"
    log.write_text(json.dumps(protocol) + "\n")

    with pytest.raises(LakeError, match="needs variantType, which lepton cannot read"):
        lepton.table(tmp_path / "t")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    snapshot = lepton.write(pa.table({"x": [1]}), tmp_path / "t")
    name = snapshot.files()[0].path
    (tmp_path / "t" / name).unlink()

    with pytest.raises(LakeError, match=name):
        snapshot.to_arrow()


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ("x > 2", [3, 4]),
        ("x > 2 AND s = 'd'", [4]),
        ("NOT x > 2 OR s <> 'c'", [1, 2, 4]),
        ("s IN ('a', 'd')", [1, 4]),
        ("x BETWEEN 2 AND 3", [2, 3]),
        ("n IS NULL", [2]),
        ("n > 0", [1, 3, 4]),
        ("x + 1 = 3", [2]),
        ("part = 'p'", [1, 2]),
        ("part = 'p' AND x = 2", [2]),
    ],
)
def test_filters_keep_what_sql_would(tmp_path: Path, condition: str, kept: list[int]) -> None:
    data = {"x": [1, 2, 3, 4], "s": list("abcd"), "n": [1, None, 1, 1], "part": list("ppqq")}
    snapshot = lepton.write(pa.table(data), tmp_path / "t", partition_by=["part"])
    chosen = snapshot.where(condition)

    assert sorted(chosen.to_arrow()["x"].to_pylist()) == kept
    assert chosen.count_rows() == len(kept)
    assert chosen.select(["x"]).to_arrow().column_names == ["x"]


def test_a_filter_that_is_not_understood_is_refused(tmp_path: Path) -> None:
    snapshot = lepton.write(pa.table({"x": [1]}), tmp_path / "t")
    for wrong in ("x >", "x LIKE 'a%'", "SELECT 1"):
        with pytest.raises(LakeError):
            snapshot.where(wrong)


def test_writes_merge_replace_and_happen_once(tmp_path: Path) -> None:
    uri = tmp_path / "t"
    lepton.write(pa.table({"k": [1, 2], "v": ["a", "b"]}), uri)
    lepton.write(pa.table({"k": [2, 3], "v": ["B", "c"]}), uri, mode="merge", key="k")
    once = lepton.write(pa.table({"k": [9], "v": ["z"]}), uri, txn=("app", 1))
    twice = lepton.write(pa.table({"k": [9], "v": ["z"]}), uri, txn=("app", 1))

    assert once.version == twice.version
    assert sorted(twice.to_arrow()["v"].to_pylist()) == ["B", "a", "c", "z"]
    replaced = lepton.write(
        pa.table({"k": [9], "v": ["y"]}), uri, mode="replace_where", where="k = 9"
    )
    assert sorted(replaced.to_arrow()["v"].to_pylist()) == ["B", "a", "c", "y"]
    with pytest.raises(ValueError, match="key="):
        lepton.write(pa.table({"k": [1]}), uri, mode="merge")
    with pytest.raises(TypeError, match="cannot write a list"):
        lepton.write([1], uri)


def test_lists_of_a_fixed_size_and_tensors_are_read_as_lists(tmp_path: Path) -> None:
    """Arrow's own types come back from files that Arrow wrote; the table has lists."""
    flat = pa.array(np.arange(24, dtype="float32"))
    fixed = pa.FixedSizeListArray.from_arrays(flat, 4)
    nulls = pa.array([[1.0, 2.0], None, [3.0, 4.0]] * 2, pa.list_(pa.float64(), 2))
    wide = pa.array([["a"], [], None, ["b", "c"], [], ["d"]], pa.large_list(pa.string()))
    rows = pa.table({"fixed": fixed, "nulls": nulls, "wide": wide})
    found = lepton.write(rows, tmp_path / "t").to_arrow()

    for name in rows.column_names:
        assert found[name].to_pylist() == rows[name].to_pylist()


def test_the_head_is_the_beginning_and_no_more_files_than_it_needs(tmp_path: Path) -> None:
    for n in range(3):
        lepton.write(pa.table({"x": [n, n]}), tmp_path / "t")
    table = lepton.table(tmp_path / "t")
    whole = table.to_arrow()
    assert lepton.table(tmp_path / "t", version=0).head(9).num_rows == 2
    (tmp_path / "t" / table.files()[2].path).unlink()

    assert [table.head(n).num_rows for n in (0, 1, 3, 4)] == [0, 1, 3, 4]
    assert table.head(3).equals(whole.slice(0, 3))
    assert table.where(f"x <> {whole['x'][0]}").head(2).equals(whole.slice(2, 2))
    assert table.head(0).schema == table.schema
    with pytest.raises(ValueError, match="n >= 0, not -1"):
        table.head(-1)


def test_the_schema_tells_comments(tmp_path: Path) -> None:
    log = Log(tmp_path / "t")
    told = column("x", "long") | {"metadata": {"comment": "how many"}}
    log.commit(protocol(), metadata([told, column("y", "long")]))
    schema: Any = lepton.table(tmp_path / "t").schema

    assert [f.metadata for f in schema] == [{b"comment": b"how many"}, None]
    assert lepton.table(tmp_path / "t").select(["x"]).schema.field(0).metadata
