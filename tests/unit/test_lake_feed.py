"""A table with a change data feed tells every change of every mode, and no other."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from hypothesis import given, settings
from hypothesis import strategies as st

import lepton
from lepton.lake.maintenance import optimize

SCHEMA = pa.schema({"k": pa.int64(), "v": pa.string(), "p": pa.string()})
PARTS = ["x", "a/b c%", None]

Row = tuple[int, str | None, str | None]
Rows = Counter[Row]


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[str, list[Row]]]:
    """Modes and their rows; keys are unique within a step."""
    values, parts = st.sampled_from(["a", "b", None]), st.sampled_from(PARTS)
    some = st.dictionaries(st.integers(0, 7), st.tuples(values, parts), min_size=1, max_size=5)
    modes = st.sampled_from(["append", "overwrite", "merge", "replace_where", "optimize"])
    chosen = draw(st.lists(st.tuples(modes, some), min_size=1, max_size=5))
    return [(mode, [(k, *rest) for k, rest in rows.items()]) for mode, rows in chosen]


def table_of(rows: list[Row]) -> pa.Table:
    columns = zip(*rows, strict=True)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], SCHEMA)


def write(uri: Path, mode: str, rows: list[Row], before: Rows) -> Rows | None:
    """Write, and return the rows that must then be there; None where the step cannot be done."""
    after = before.copy()
    how: dict[str, Any] = {}
    if mode == "merge":
        if any(n > 1 for n in Counter(k for k, _, _ in before.elements()).values()):
            return None  # the target has a key twice: both rows change, which a feed tells too
        how = {"key": "k"}
        mine = {k for k, _, _ in rows}
        after = Counter(r for r in before.elements() if r[0] not in mine) + Counter(rows)
    elif mode == "replace_where":
        how = {"where": "k >= 4"}
        rows = [r for r in rows if r[0] >= 4]
        if not rows:
            return None
        after = Counter(r for r in before.elements() if r[0] < 4) + Counter(rows)
    elif mode == "overwrite":
        after = Counter(rows)
    elif mode == "append":
        after.update(rows)
    if mode == "optimize":
        optimize(uri)
    else:
        lepton.write(table_of(rows), uri, mode=mode, **how)  # type: ignore[arg-type]
    return after


def told(uri: Path, since: int) -> dict[str, Rows]:
    found: dict[str, Rows] = {}
    for row in lepton.table(uri).changes(since).to_pylist():
        found.setdefault(row["_change_type"], Counter())[row["k"], row["v"], row["p"]] += 1
    return found


@settings(max_examples=15, deadline=None)
@given(steps(), st.booleans())
def test_the_feed_of_every_mode_leads_from_before_to_after(
    tmp_path_factory: pytest.TempPathFactory, asked: list[tuple[str, list[Row]]], parted: bool
) -> None:
    uri = tmp_path_factory.mktemp("t") / "t"
    feed = {"delta.enableChangeDataFeed": "true"}
    DeltaTable.create(str(uri), SCHEMA, partition_by=["p"] if parted else None, configuration=feed)
    before: Rows = Counter()
    for mode, rows in asked:
        version = lepton.table(uri).version
        after = write(uri, mode, rows, before)
        if after is None:
            continue
        changes = told(uri, version)
        none: Rows = Counter()
        gone = changes.get("delete", none) + changes.get("update_preimage", none)
        come = changes.get("insert", none) + changes.get("update_postimage", none)

        assert before - gone + come == after
        assert not gone - before
        if mode == "merge":
            old, new = ({r[0] for r in side.elements()} for side in (before, Counter(rows)))
            updated = {r[0] for r in changes.get("update_postimage", none).elements()}
            inserted = {r[0] for r in changes.get("insert", none).elements()}
            assert (updated, inserted) == (old & new, new - old)
            assert "delete" not in changes
        if mode == "optimize":
            assert not changes
        before = after


def test_a_column_that_came_later_is_null_in_older_changes(tmp_path: Path) -> None:
    uri = tmp_path / "t"
    DeltaTable.create(str(uri), SCHEMA, configuration={"delta.enableChangeDataFeed": "true"})
    lepton.write(table_of([(1, "a", "x"), (2, "b", "x")]), uri)
    lepton.write(table_of([(1, "A", "x")]), uri, mode="merge", key="k")
    wider = table_of([(3, "c", "x")]).append_column("n", pa.array([0.5]))
    lepton.write(wider, uri, evolve="add")

    rows = lepton.table(uri).changes(1).select(["k", "v", "n", "_change_type"]).to_pylist()
    assert sorted(tuple(r.values()) for r in rows if r["k"] == 1) == [
        (1, "A", None, "update_postimage"),
        (1, "a", None, "update_preimage"),
    ]
    assert [r["n"] for r in rows if r["k"] == 3] == [0.5]


def test_a_table_made_anew_in_its_place_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    uri = tmp_path / "t"
    lepton.write(pa.table({"x": [1]}), uri)
    assert lepton.table(uri).where("x > 0").to_arrow()["x"].to_pylist() == [1]
    shutil.rmtree(uri)
    lepton.write(pa.table({"y": ["new"]}), uri)

    assert lepton.table(uri).to_arrow().to_pylist() == [{"y": "new"}]
