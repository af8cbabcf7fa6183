"""The benchmark's own conformance cases: lepton answers each right, or refuses it by name."""

from pathlib import Path

import pytest

import lepton
from benchmarks.conformance_once import answer
from benchmarks.conformance_readers import READERS
from benchmarks.conformance_tables import PUBLIC, cases

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
    from decimal import Decimal

    import pyarrow as pa

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
