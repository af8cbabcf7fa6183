"""A table's schema grows on request, in ways that lose nothing, or stays as it is."""

from decimal import Context, Decimal
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

import lepton
from benchmarks.conformance_log import Log, column, metadata, protocol
from lepton.errors import LakeError, WriteConflict
from lepton.lake.evolution import Evolution, evolution, widens
from lepton.lake.files import write_files
from lepton.lake.growth import add_columns
from lepton.lake.read import unchecked_files
from lepton.lake.rules import rules_of

OLD = pa.table({"x": pa.array([1, 2], pa.int32()), "p": ["a", "b"]})
NEW = pa.table({"x": pa.array([3], pa.int32()), "p": ["a"], "y": [0.5]})
KINDS = [
    pa.int8(),
    pa.int16(),
    pa.int32(),
    pa.int64(),
    pa.float32(),
    pa.float64(),
    pa.decimal128(5, 2),
    pa.decimal128(9, 2),
    pa.decimal128(22, 2),
    pa.string(),
]


@pytest.fixture
def uri(tmp_path: Path) -> str:
    lepton.write(OLD, tmp_path / "t", partition_by=["p"])
    return str(tmp_path / "t")


def rows(uri: str) -> list[dict[str, Any]]:
    return sorted(lepton.table(uri).to_arrow().to_pylist(), key=lambda r: str(r["x"]))


def test_columns_are_added_on_request_only(uri: str) -> None:
    with pytest.raises(LakeError, match=r"t'@0; nothing was committed: no column y"):
        lepton.write(NEW, uri)
    lepton.write(NEW, uri, evolve="add", txn=("job", 1))
    lepton.write(NEW, uri, evolve="add", txn=("job", 1))

    old = [{"x": 1, "p": "a", "y": None}, {"x": 2, "p": "b", "y": None}]
    assert rows(uri) == [*old, {"x": 3, "p": "a", "y": 0.5}]
    assert lepton.table(uri).where("y IS NULL").count_rows() == 2
    told = [c.operation for c in lepton.table(uri).history()]
    assert told == ["WRITE", "ADD COLUMN", told[-1]]
    assert [r["x"] for r in lepton.table(uri, version=0).to_arrow().to_pylist()] == [1, 2]


def test_nested_and_odd_columns_are_added_and_are_nullable(uri: str) -> None:
    kind = pa.struct([pa.field("a", pa.list_(pa.int64())), pa.field("t", pa.timestamp("us"))])
    new = pa.table({"x": pa.array([3], pa.int32()), "p": ["a"]}).append_column(
        pa.field("s", kind, nullable=False), pa.array([{"a": [1], "t": None}], kind)
    )
    table = lepton.write(new, uri, evolve="add")

    assert table.schema.field("s").nullable
    assert rows(uri)[-1]["s"] == {"a": [1], "t": None}
    assert rows(uri)[0]["s"] is None
    assert lepton.table(uri, version=0).schema.names == ["x", "p"]


REFUSED: list[tuple[pa.Table, str, str]] = [
    (NEW.rename_columns(["x", "P", "y"]), "add", "no column P can be added: Delta takes it for p"),
    (NEW.append_column("n", pa.nulls(1)), "add", "column n is null"),
    (NEW.drop_columns("p"), "add", "lack column p"),
    (
        NEW.set_column(0, "x", pa.array([2**40])),
        "add",
        "column x is int32, and the rows have int64",
    ),
    (
        NEW.set_column(0, "x", pa.array([2**40])),
        "widen",
        r"x \(int32 to int64\).*delta.enableTypeWidening.*evolve='rewrite'",
    ),
]


@pytest.mark.parametrize(("new", "how", "told"), REFUSED)
def test_what_does_not_go_changes_nothing(uri: str, new: pa.Table, how: Any, told: str) -> None:
    with pytest.raises(LakeError, match=rf"t'@0; nothing was committed: .*{told}"):
        lepton.write(new, uri, evolve=how)

    assert lepton.table(uri).version == 0
    assert len(list(Path(uri).rglob("*.parquet"))) == 2


@pytest.mark.parametrize(
    "how",
    [
        {"mode": "merge", "key": "x", "evolve": "add"},
        {"mode": "replace_where", "where": "x = 3", "evolve": "add"},
        {"evolve": "everything"},
    ],
)
def test_arguments_that_do_not_go_together(uri: str, how: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="evolve"):
        lepton.write(NEW, uri, **how)


def test_an_overwrite_takes_wider_types_and_keeps_the_rest(tmp_path: Path) -> None:
    log = Log(tmp_path / "t")
    named = column("x", "integer") | {"metadata": {"comment": "how many"}}
    log.commit(
        protocol(reader=1, writer=2),
        metadata([named, column("p", "string")], ["p"], appendOnly="false"),
        log.add("1.parquet", pa.table({"x": pa.array([1], pa.int32())}), {"p": "a"}),
    )
    wide = pa.table({"x": [2**40], "p": ["b"], "y": ["new"]})
    table = lepton.write(wide, tmp_path / "t", mode="overwrite", evolve="widen")
    opened = DeltaTable(tmp_path / "t")

    assert table.to_arrow().to_pylist() == wide.to_pylist()
    assert opened.schema().fields[0].metadata == {"comment": "how many"}
    assert opened.metadata().configuration == {"delta.appendOnly": "false"}
    assert lepton.table(tmp_path / "t", version=0).to_arrow().to_pylist() == [{"x": 1, "p": "a"}]


def narrow_table(path: Path, **configuration: str) -> str:
    schema = pa.schema({"x": pa.int32(), "f": pa.float32(), "p": pa.string()})
    for n in range(3):
        rows = pa.table({"x": [n], "f": [0.1], "p": ["ab"[n % 2]]}, schema=schema)
        config = configuration if n == 0 else None
        write_deltalake(path, rows, mode="append", partition_by=["p"], configuration=config)
    return str(path)


WIDE = pa.table({"x": [2**40], "f": pa.array([0.1]), "p": ["b"], "y": [7]})


def test_an_append_writes_every_file_anew_for_wider_types_on_request(tmp_path: Path) -> None:
    uri = narrow_table(tmp_path / "t")
    with pytest.raises(LakeError, match="evolve='rewrite'"):
        lepton.write(WIDE, uri, evolve="widen")
    table = lepton.write(WIDE, uri, evolve="rewrite", txn=("job", 1))

    assert lepton.write(WIDE, uri, evolve="rewrite", txn=("job", 1)).version == table.version == 3
    assert [f.type for f in table.schema] == [pa.int64(), pa.float64(), pa.string(), pa.int64()]
    narrow = float(np.float32(0.1))
    assert sorted(map(repr, table.to_arrow().to_pylist())) == sorted(
        map(
            repr,
            [{"x": n, "f": narrow, "p": "ab"[n % 2], "y": None} for n in range(3)]
            + WIDE.to_pylist(),
        )
    )
    assert unchecked_files(table.load()) == ()
    assert lepton.table(uri, version=2).count_rows() == 3


@pytest.mark.parametrize(
    ("rule", "told"),
    [("delta.appendOnly", "append-only"), ("delta.enableChangeDataFeed", "change data feed")],
)
def test_a_table_whose_files_must_stay_is_not_written_anew(
    tmp_path: Path, rule: str, told: str
) -> None:
    uri = narrow_table(tmp_path / "t", **{rule: "true"})
    files = set(Path(uri).rglob("*.parquet"))
    with pytest.raises(LakeError, match=rf"@2; nothing was committed: .*{told}"):
        lepton.write(WIDE, uri, evolve="rewrite")
    assert set(Path(uri).rglob("*.parquet")) == files


def test_rows_that_come_while_a_table_is_written_anew_are_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("lepton.lake.write")
    uri = narrow_table(tmp_path / "t")
    real = module.written_wider

    def late(*given: Any) -> Any:
        lepton.write(pa.table({"x": [9], "f": [0.5], "p": ["a"]}), uri)
        return real(*given)

    monkeypatch.setattr(module, "written_wider", late)
    with pytest.raises(WriteConflict, match="commit 3"):
        lepton.write(WIDE, uri, evolve="rewrite")
    assert sorted(lepton.table(uri).to_arrow()["x"].to_pylist()) == [0, 1, 2, 9]
    assert len(set(Path(uri).rglob("part-*.parquet"))) == 4


def test_writers_that_add_at_once_agree_or_conflict(uri: str) -> None:
    stale = DeltaTable(uri)
    rules = rules_of(stale, uri)
    grown = evolution(rules.schema, NEW.schema, "add")
    lepton.write(NEW, uri, evolve="add")
    _, now = add_columns(stale, rules, grown, [], uri=uri, options=None)
    assert now.schema.equals(grown.schema)

    other = Evolution(schema=pa.schema([]), added=(pa.field("y", pa.string()),))
    files = write_files(pa.table({"x": pa.array([9], pa.int32()), "p": ["a"]}), uri, ["p"])
    with pytest.raises(WriteConflict, match=r"commit 1 \(ADD COLUMN.*t'@0"):
        add_columns(DeltaTable(uri, version=0), rules, other, files, uri=uri, options=None)
    assert not (Path(uri) / files[0].path).exists()
    assert len(rows(uri)) == 3


def test_a_write_cut_off_after_its_column_was_added_is_written_again(uri: str) -> None:
    opened = DeltaTable(uri)
    rules = rules_of(opened, uri)
    grown = evolution(rules.schema, NEW.schema, "add")
    add_columns(opened, rules, grown, [], uri=uri, options=None)
    assert [r["y"] for r in rows(uri)] == [None, None]
    lepton.write(NEW, uri, evolve="add", txn=("job", 1))

    assert [r["y"] for r in rows(uri)] == [None, None, 0.5]


def test_columns_are_added_after_commits_that_leave_the_rules_alone(tmp_path: Path) -> None:
    uri = str(tmp_path / "t")
    lepton.write(OLD, uri)
    stale = DeltaTable(uri)
    rules = rules_of(stale, uri)
    DeltaTable(uri).alter.set_table_properties({"delta.logRetentionDuration": "interval 9 days"})
    lepton.write(OLD, uri)
    grown = evolution(rules.schema, NEW.schema, "add")
    opened, now = add_columns(stale, rules, grown, [], uri=uri, options=None)
    assert now.schema.names == [*rules.schema.names, *(f.name for f in grown.added)]
    assert opened.version() == 3


@pytest.mark.parametrize(
    "feature",
    [
        "variantType",
        "variantType-preview",
        "identityColumns",
        "rowTracking",
        "clustering",
    ],
)
def test_features_that_deltalake_cannot_write_are_refused_by_name(
    tmp_path: Path, feature: str
) -> None:
    log = Log(tmp_path / "t")
    asks = protocol([feature])
    if feature[0] in "dirca":  # features of writers only
        asks["protocol"]["readerFeatures"] = []
    log.commit(asks, metadata([column("x", "integer")]))
    with pytest.raises(LakeError, match=rf"t'@0 asks its writers for {feature}") as caught:
        lepton.write(pa.table({"x": [1]}), tmp_path / "t", evolve="add")
    assert not isinstance(caught.value, WriteConflict)


@pytest.mark.parametrize("narrow", KINDS, ids=str)
@pytest.mark.parametrize("wide", KINDS, ids=str)
def test_a_wider_type_holds_every_value(narrow: Any, wide: Any) -> None:
    if not widens(narrow, wide):
        return
    assert not widens(wide, narrow)
    values: list[Any] = [0, 1, -1]
    if pa.types.is_integer(narrow):
        values += [2 ** (narrow.bit_width - 1) - 1, -(2 ** (narrow.bit_width - 1))]
    elif pa.types.is_floating(narrow):
        values += [0.1, 3.4e38, 1e-45, float("inf")]
    else:
        last = Decimal(10**narrow.precision - 1).scaleb(-narrow.scale, Context(prec=38))
        values = [Decimal(0), last, -last]
    stored = pa.array(values, narrow)

    assert stored.cast(wide).cast(narrow).equals(stored)


def test_some_types_do_widen() -> None:
    pairs = [(a, b) for a in KINDS for b in KINDS if widens(a, b)]
    assert (pa.int32(), pa.int64()) in pairs
    assert (pa.int64(), pa.decimal128(22, 2)) in pairs
    assert (pa.decimal128(5, 2), pa.decimal128(9, 2)) in pairs
    assert not any(pa.string() in pair for pair in pairs)


def test_nothing_changes_where_nothing_was_asked() -> None:
    schema = pa.schema([pa.field("x", pa.int32(), nullable=False)])
    assert evolution(schema, pa.schema([pa.field("y", pa.int32())]), None).schema == schema
    same = evolution(schema, pa.schema([pa.field("x", pa.null())]), "widen", anew=True)
    assert same == Evolution(schema=schema)
