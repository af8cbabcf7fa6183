"""Another commit lands between a write's look at the table and its own commit."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable

import lepton
from benchmarks.conformance_log import Action, Log, column, metadata, protocol
from lepton.errors import WriteConflict
from lepton.lake.commit import commit_files
from lepton.lake.evolution import evolution
from lepton.lake.files import write_files
from lepton.lake.growth import add_columns
from lepton.lake.rules import rules_of

X = column("x", "long")
MAPPED = metadata([column("x", "long", "c1", 1)], columnMapping_mode="name")


def of_writers(*features: str) -> Action:
    asks = protocol(features)
    asks["protocol"]["readerFeatures"] = []
    return asks


def begun(root: Path, own: bool) -> tuple[Log, Any]:
    """A table with one row, and how it was opened; ``own``: only lepton writes its commits."""
    log = Log(root)
    asks = of_writers("domainMetadata") if own else protocol(reader=1, writer=2)
    log.commit(asks, metadata([X]), log.add("a.parquet", pa.table({"x": [7]}), stats={}))
    return log, DeltaTable(root)


CHANGES: dict[str, list[Action]] = {
    "a feature of writers": [of_writers("rowTracking")],
    "a feature of readers": [protocol(["variantType"])],
    "mapped columns": [protocol(["columnMapping"]), MAPPED],
    "another column": [metadata([column("y", "long")])],
    "another type": [metadata([column("x", "string")])],
    "a partition": [metadata([X], ["x"])],
    "a constraint": [metadata([X], constraints_low="x > 5")],
    "appends only": [metadata([X], appendOnly="true")],
}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_rows_for_another_table_are_not_committed(tmp_path: Path, name: str, own: bool) -> None:
    log, opened = begun(tmp_path / "t", own)
    uri, rules = str(log.root), rules_of(opened, str(log.root))
    files = write_files(pa.table({"x": [1]}), uri)
    log.commit(*CHANGES[name])
    with pytest.raises(WriteConflict, match=r"commit 1 .* changed table .*t'@0 meanwhile"):
        commit_files(opened, rules, files, uri=uri, mode="append", txn=None, options=None)

    assert DeltaTable(uri).version() == 1
    assert [p.name for p in log.root.glob("*.parquet")] == ["a.parquet"]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    "harmless",
    [
        {"txn": {"appId": "other", "version": 9}},
        {"domainMetadata": {"domain": "d", "configuration": "{}", "removed": False}},
        metadata([X], logRetentionDuration="interval 9 days"),
    ],
    ids=["transaction", "domain", "property"],
)
def test_rows_go_beside_what_does_not_concern_them(
    tmp_path: Path, harmless: Action, own: bool
) -> None:
    log, opened = begun(tmp_path / "t", own)
    uri, rules = str(log.root), rules_of(opened, str(log.root))
    if own or "domainMetadata" not in harmless:
        log.commit(harmless)
    files = write_files(pa.table({"x": [1]}), uri)
    assert commit_files(opened, rules, files, uri=uri, mode="append", txn=("me", 1), options=None)
    assert not commit_files(
        opened,
        rules,
        write_files(pa.table({"x": [1]}), uri),
        uri=uri,
        mode="append",
        txn=("me", 1),
        options=None,
    )

    assert sorted(lepton.table(uri).to_arrow()["x"].to_pylist()) == [1, 7]
    assert len(list(log.root.glob("*.parquet"))) == 2


@pytest.mark.parametrize("own", [False, True])
def test_a_column_for_another_table_is_not_added_and_leaves_no_file(
    tmp_path: Path, own: bool
) -> None:
    log, opened = begun(tmp_path / "t", own)
    uri, rules = str(log.root), rules_of(opened, str(log.root))
    files = write_files(pa.table({"x": [1], "y": [2]}), uri)
    grown = evolution(rules.schema, pa.schema({"x": pa.int64(), "y": pa.int64()}), "add")
    log.commit(metadata([X, column("y", "string")]))
    with pytest.raises(WriteConflict, match="commit 1"):
        add_columns(opened, rules, grown, files, uri=uri, options=None)

    assert DeltaTable(uri).version() == 1
    assert [p.name for p in log.root.glob("*.parquet")] == ["a.parquet"]
