"""The benchmark's own conformance cases: lepton answers each right, or refuses it by name."""

from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

import lepton
from benchmarks.conformance_log import Log, column, metadata, protocol, without
from benchmarks.conformance_mapping import deletions_inline
from benchmarks.conformance_once import answer
from benchmarks.conformance_readers import READERS
from benchmarks.conformance_tables import PUBLIC, cases
from lepton.errors import LakeError

REFUSED = {"variant_plain": "variantType", "variant_shredded": "variantShredding, variantType"}


def test_every_case_is_right_or_refused_by_name(tmp_path: Path) -> None:
    made = [c for c in cases(tmp_path) if not c.table.is_relative_to(PUBLIC)]
    answers = {c.name: answer(READERS["lepton"], c) for c in made}
    others = {name: a for name, a in answers.items() if a[0] != "right"}

    assert len(made) > 50
    assert set(others) == set(REFUSED), others
    for name, feature in REFUSED.items():
        outcome, detail = others[name]
        assert outcome == "refused"
        assert f"{name}'@0 needs {feature}, which lepton cannot read" in detail


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ("d < 1.2300000000000000001", ["1.23"]),
        ("d = 5", ["5.00"]),
        ("d IN (5, 1.2300000000000000001)", ["5.00"]),
        ("d BETWEEN 1.2300000000000000001 AND 5.0000", ["5.00"]),
        ("d > -0.5 AND NOT d + 1 > 2.5", ["1.23"]),
        ("s.d = 1.5", ["5.00"]),
    ],
)
def test_a_number_beside_a_decimal_is_a_decimal(
    tmp_path: Path, condition: str, kept: list[str]
) -> None:
    kind = pa.decimal128(10, 2)
    rows = [
        {"d": Decimal("1.23"), "s": {"d": Decimal("0.50")}},
        {"d": Decimal("5.00"), "s": {"d": Decimal("1.50")}},
        {"d": None, "s": None},
    ]
    data = pa.Table.from_pylist(rows, pa.schema({"d": kind, "s": pa.struct({"d": kind})}))
    snapshot = lepton.write(data, tmp_path / "t").where(condition)

    assert [str(v) for v in snapshot.to_arrow()["d"].to_pylist()] == kept
    assert snapshot.count_rows() == len(kept)


def test_a_time_without_a_zone_is_utc_beside_an_instant(tmp_path: Path) -> None:
    moments = [datetime(2020, 1, 1, hour, tzinfo=UTC) for hour in range(3)]
    rows = {"at": moments, "local": [m.replace(tzinfo=None) for m in moments]}
    snapshot = lepton.write(pa.table(rows), tmp_path / "t")
    for text in (
        "at = TIMESTAMP '2020-01-01 01:00:00'",
        "at IN (TIMESTAMP '2020-01-01 02:00:00+01')",
    ):
        assert snapshot.where(text).to_arrow()["at"].to_pylist() == moments[1:2]
    for text in ("at >= '2020-01-01T02:00:00Z'", "local >= '2020-01-01 02:00:00'"):
        assert snapshot.where(text).count_rows() == 1
    assert snapshot.where("at >= DATE '2020-01-01' AND local >= '2020-01-01'").count_rows() == 3
    with pytest.raises(LakeError, match=r"cannot parse the filter .*'soon'"):
        snapshot.where("at > 'soon'")
    between = "at BETWEEN TIMESTAMP '2020-01-01 00:30:00' AND TIMESTAMP '2020-01-01 09:00:00'"
    assert snapshot.where(between).count_rows() == 2
    assert snapshot.where("local > TIMESTAMP '2020-01-01 01:00:00'").count_rows() == 1
    with pytest.raises(LakeError, match=r"does not fit the table"):
        snapshot.where(pc.field("at") == datetime(2020, 1, 1))
    with pytest.raises(LakeError, match=r"does not fit the table"):
        snapshot.where("local = TIMESTAMP '2020-01-01 00:00:00Z'")


@pytest.mark.parametrize("name", ["a b", "a%b", "a#b", "ü?", "x=y"])
def test_a_table_is_found_under_any_name_of_its_folder(tmp_path: Path, name: str) -> None:
    deletions_inline(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / name)
    roundabout = f"{tmp_path / name}/../{name}/"
    for uri in (tmp_path / name, (tmp_path / name).as_uri(), tmp_path / "link", roundabout):
        snapshot = lepton.table(uri)

        assert sorted(snapshot.to_arrow()["x"].to_pylist()) == [1, 2, 5, 6, 7, 9]


def test_deletion_vectors_of_a_shallow_clone_are_applied(tmp_path: Path) -> None:
    log = Log(tmp_path / "clone")
    file = tmp_path / "source of it" / "1.parquet"
    rows = pa.table({"x": [1, 2, 3]})
    add = log.add(f"../{file.parent.name}/1.parquet", rows, path=file.as_uri(), stats={})
    columns = metadata([column("x", "long")])
    log.commit(protocol(["deletionVectors"]), columns, without(add, [1]))

    assert lepton.table(tmp_path / "clone").to_arrow()["x"].to_pylist() == [1, 3]


def test_a_folder_that_deltalake_would_take_for_another_is_refused(tmp_path: Path) -> None:
    for name in ("a b", "a%20b"):
        deletions_inline(tmp_path / name)
    with pytest.raises(LakeError, match=r"a%20b' has a percent escape .* rename it"):
        lepton.table(tmp_path / "a%20b")


def test_a_file_without_the_field_ids_that_it_is_read_by_is_refused(tmp_path: Path) -> None:
    log = Log(tmp_path / "t")
    mode = {"columnMapping_mode": "id", "columnMapping_maxColumnId": "1"}
    add = log.add("1.parquet", pa.table({"p1": [7]}))
    log.commit(protocol(["columnMapping"]), metadata([column("a", "long", "p1", 1)], **mode), add)

    with pytest.raises(LakeError, match=r"t'@0 maps columns by id, but .*1\.parquet' has no field"):
        lepton.table(tmp_path / "t").to_arrow()
