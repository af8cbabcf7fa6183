"""Rows that do not fit are refused before any commit; what is written is whole and once."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

import lepton
from benchmarks.conformance_log import Log, array_of, column, metadata, protocol, struct_of
from lepton.errors import LakeError, WriteConflict
from lepton.lake.commit import commit_files
from lepton.lake.files import statistics_json, write_files
from lepton.lake.rules import rules_of

SCHEMA = pa.schema([pa.field("id", pa.int32(), nullable=False), pa.field("name", pa.string())])


@pytest.fixture
def uri(tmp_path: Path) -> str:
    path = str(tmp_path / "t")
    DeltaTable.create(path, SCHEMA).alter.add_constraint({"positive": "id > 0"})
    lepton.write(pa.table({"id": [1, 2], "name": ["a", "b"]}), path)
    return path


BAD: list[tuple[dict[str, Any], str]] = [
    ({"id": [3], "nam": ["x"]}, "no column nam.*name"),
    ({"id": [3]}, "lack column name"),
    ({"id": [None], "name": ["x"]}, "id has a NULL"),
    ({"id": ["3"], "name": ["x"]}, "column id is int32"),
    ({"id": [2**40], "name": ["x"]}, "column id is int32"),
    ({"id": [0.5], "name": ["x"]}, "column id is int32"),
    ({"id": [-3], "name": ["x"]}, "constraint positive.*-3"),
]


@pytest.mark.parametrize(("rows", "told"), BAD)
@pytest.mark.parametrize(
    "how",
    [{}, {"mode": "overwrite"}, {"mode": "merge", "key": "id"}, {"mode": "replace_where"}],
    ids=["append", "overwrite", "merge", "replace_where"],
)
def test_bad_rows_change_nothing(
    uri: str, rows: dict[str, Any], told: str, how: dict[str, Any]
) -> None:
    where = {"where": "id > 0"} if how.get("mode") == "replace_where" else {}
    with pytest.raises(LakeError, match=rf"t'@2.*{told}"):
        lepton.write(pa.table(rows), uri, **how, **where)

    assert lepton.table(uri).version == 2
    assert len(list(Path(uri).glob("*.parquet"))) == 1


def test_other_partitions_than_the_tables_are_refused(uri: str) -> None:
    with pytest.raises(LakeError, match=r"@2 is partitioned by \[\], not by \['name'\]"):
        lepton.write(pa.table({"id": [3], "name": ["c"]}), uri, partition_by=["name"])


def test_a_doubled_key_is_named(uri: str) -> None:
    rows = pa.table({"id": [7, 7, 8], "name": ["x", "y", "z"]})
    with pytest.raises(LakeError, match=r"@2.*'id': 7.*2 times"):
        lepton.write(rows, uri, mode="merge", key="id")


def test_files_carry_checksums_and_statistics(uri: str) -> None:
    (file,) = Path(uri).glob("*.parquet")
    told = lepton.table(uri).statistics().to_pylist()[0]

    assert pq.read_table(file, page_checksum_verification=True).num_rows == 2
    assert told["rows"] == 2
    assert told["min"] == {"id": 1, "name": "a"}
    assert told["max"] == {"id": 2, "name": "b"}
    assert told["null_count"] == {"id": 0, "name": 0}


def test_long_strings_are_cut_to_bounds_that_hold() -> None:
    found = json.loads(statistics_json(pa.table({"s": ["b" * 40, None], "f": [1.0, float("nan")]})))

    assert found["minValues"]["s"] <= "b" * 40 <= found["maxValues"]["s"]
    assert len(found["maxValues"]["s"]) == 33
    assert found["nullCount"] == {"s": 1, "f": 0}
    assert "f" not in found["minValues"]


def test_partitions_come_back_as_written(tmp_path: Path) -> None:
    rows = pa.table({"p": ["a/b c%", None, "é", "plain"], "x": [1, 2, 3, 4]})
    again = lepton.write(rows, tmp_path / "t", partition_by=["p"]).to_arrow()

    assert again.sort_by("x").to_pylist() == rows.to_pylist()
    with pytest.raises(LakeError, match="empty string"):
        lepton.write(pa.table({"p": [""], "x": [1]}), tmp_path / "t")


def test_a_transaction_counts_once_for_a_stale_handle_too(uri: str) -> None:
    stale = DeltaTable(uri)
    lepton.write(pa.table({"id": [3], "name": ["c"]}), uri, txn=("job", 1))
    lepton.write(pa.table({"id": [3], "name": ["c"]}), uri, txn=("job", 1))
    files = write_files(pa.table({"id": [3], "name": ["c"]}, schema=SCHEMA), uri)
    done = commit_files(
        stale, rules_of(stale, uri), files, uri=uri, mode="append", txn=("job", 1), options=None
    )

    assert not done
    assert lepton.table(uri).count_rows() == 3
    assert not (Path(uri) / files[0].path).exists()


def test_two_overwrites_conflict_and_the_first_is_named(uri: str) -> None:
    stale = DeltaTable(uri)
    lepton.write(pa.table({"id": [9], "name": ["z"]}), uri, mode="overwrite")
    files = write_files(pa.table({"id": [3], "name": ["c"]}, schema=SCHEMA), uri)
    with pytest.raises(WriteConflict, match=r"commit 3 \(WRITE, .*t'@2"):
        commit_files(
            stale, rules_of(stale, uri), files, uri=uri, mode="overwrite", txn=None, options=None
        )

    assert lepton.table(uri).to_arrow()["id"].to_pylist() == [9]


def test_a_file_that_is_cut_off_is_never_committed(uri: str) -> None:
    opened = DeltaTable(uri)
    files = write_files(pa.table({"id": [3], "name": ["c"]}, schema=SCHEMA), uri)
    (Path(uri) / files[0].path).write_bytes(b"PAR1")
    with pytest.raises(LakeError, match=files[0].path):
        commit_files(
            opened, rules_of(opened, uri), files, uri=uri, mode="append", txn=None, options=None
        )

    assert lepton.table(uri).version == 2


def test_rules_inside_columns_are_refused_by_name(tmp_path: Path) -> None:
    member = column("y", "long")
    member["metadata"] = {"delta.invariants": '{"expression": {"expression": "g.y > 3"}}'}
    log = Log(tmp_path / "t")
    log.commit(protocol(reader=1, writer=2), metadata([column("g", array_of(struct_of(member)))]))
    with pytest.raises(LakeError, match=r"@0 asks its writers for delta.invariants inside"):
        lepton.write(pa.table({"g": [[{"y": 1}]]}), log.root)


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({"delta.generationExpression": "x + 1"}, "generatedColumns \\(column y\\)"),
        ({"delta.identity.start": 1, "delta.identity.step": 1}, "identityColumns \\(column y\\)"),
    ],
)
def test_columns_that_others_work_out_are_refused_by_name(
    tmp_path: Path, rule: dict[str, Any], told: str
) -> None:
    log = Log(tmp_path / "t")
    made = column("y", "long") | {"metadata": rule}
    log.commit(protocol(reader=1, writer=6), metadata([column("x", "long"), made]))
    for mode in ("append", "overwrite"):
        with pytest.raises(LakeError, match=rf"@0 asks its writers for {told}"):
            lepton.write(pa.table({"x": [1], "y": [2]}), tmp_path / "t", mode=mode)

    assert [p.name for p in (tmp_path / "t").iterdir()] == ["_delta_log"]
    assert lepton.table(tmp_path / "t").count_rows() == 0


@pytest.mark.parametrize("txn", ["job", ("job", "1"), ("job", -1), ("job", 2**63), ("", 1), (1, 1)])
def test_a_transaction_that_is_none_is_refused(tmp_path: Path, txn: Any) -> None:
    with pytest.raises(ValueError, match="is no transaction: give \\(application id, version\\)"):
        lepton.write(pa.table({"x": [1]}), tmp_path / "t", txn=txn)
    assert not (tmp_path / "t").exists()


def test_a_transactions_version_may_be_any_whole_number(tmp_path: Path) -> None:
    for version in (np.int64(2**62), 2**62):
        lepton.write(pa.table({"x": [1]}), tmp_path / "t", txn=("job", version))
    assert lepton.table(tmp_path / "t").count_rows() == 1


def test_a_feed_goes_with_no_column_of_its_own_names(tmp_path: Path) -> None:
    feed = {"delta.enableChangeDataFeed": "true"}
    schema = pa.schema({"x": pa.int64(), "_Change_Type": pa.string()})
    DeltaTable.create(tmp_path / "t", schema, configuration=feed)
    with pytest.raises(LakeError, match="change data feed beside a column _Change_Type"):
        lepton.write(pa.table({"x": [1], "_Change_Type": ["a"]}), tmp_path / "t")


def test_a_source_that_breaks_off_leaves_no_file(uri: str) -> None:
    def broken() -> Iterator[pa.RecordBatch]:
        yield pa.record_batch([pa.array([7], pa.int32()), pa.array(["x"])], names=["id", "name"])
        raise RuntimeError("the source went away")

    before = set(Path(uri).rglob("*"))
    with pytest.raises(RuntimeError, match="went away"):
        lepton.write(pa.RecordBatchReader.from_batches(SCHEMA, broken()), uri)
    assert set(Path(uri).rglob("*")) == before
