"""docs/registry.md says of the registry's table what is so."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from lepton.promotion import CanaryRule, GateResult
from lepton.registry import ModelVersion, Registry
from lepton.registry.events import KINDS
from lepton.registry.rows import SCHEMA

PAGE = (Path(__file__).parents[2] / "docs" / "registry.md").read_text()
HOME = "lepton-home/registry"


def rows(section: str) -> dict[str, list[str]]:
    """The table of a section: cells by the first one, without backticks there."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    cells = [re.split(r"\s*\|\s*", line)[1:-1] for line in text.splitlines() if line[:3] == "| `"]
    return {first.strip("`"): rest for first, *rest in cells}


def words(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """One in which everything has happened."""
    made = Registry(tmp_path / "registry")
    rule, gate = asdict(CanaryRule()), [GateResult("f1 > 0", True, ("f1 = 1 > 0: passed",))]
    for _ in range(3):
        made.register("digits", checkpoint="c.json", manifest_sha256="s", metrics={"f1": 1.0})
    made.promote("digits", 1, expect=None, gate=gate)
    made.withdraw("digits", expect=None, reason="")
    made.promote("digits", 1, expect=None, gate=gate)
    made.start_shadow("digits", 2, 0.5, expect=None, rule=rule)
    made.start_canary("digits", 2, 0.5, expect=None, rule=rule, by="x", steps=(0.5, 0.6))
    made.pause("digits", expect=None)
    made.abort_canary("digits", expect=None, reason="")
    made.promote("digits", 2, expect=None)
    told = {"replicas": 1, "surge": True, "seconds": 1.0}
    made.replaced("digits", 2, details=told, reason="no room")
    made.rollback("digits", expect=None, reason="")
    made.alias("digits", "challenger", 2)
    made.describe("digits", 2, tags={"a": "b"}, note="n", protected=True)
    made.measure("digits", 2, "t@1", {"f1": 0.5})
    made.delete("digits", 3)
    return made


def events(registry: Registry) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = DeltaTable(registry.uri).to_pyarrow_table().to_pylist()
    return [{**row, "payload": json.loads(row["payload"])} for row in found]


def test_every_column_is_there_with_its_type() -> None:
    found = {name: cells[0].strip("`") for name, cells in rows("Columns").items()}
    assert found == {field.name: str(field.type) for field in SCHEMA}
    never = {name for name, cells in rows("Columns").items() if "Never null" in cells[1]}
    assert never == {field.name for field in SCHEMA if not field.nullable}


def test_every_kind_is_there_with_its_details(registry: Registry) -> None:
    found = {kind: words(cells[0]) for kind, cells in rows("Kinds").items()}
    seen: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for event in events(registry):
        seen[event["kind"]] |= set(event["payload"].get("details", {}))
    assert {event["kind"] for event in events(registry)} == set(KINDS)
    assert found == seen
    assert {field.name for field in fields(CanaryRule)} <= words(PAGE)


def test_every_key_of_the_payload_is_there(registry: Registry) -> None:
    seen = {key for event in events(registry) for key in event["payload"]}
    assert set(rows("Payload")) == seen
    gates = {key for event in events(registry) for one in event["payload"]["gate"] for key in one}
    assert gates <= words(rows("Payload")["gate"][0])
    versions = [e["payload"]["version"] for e in events(registry) if "version" in e["payload"]]
    described = PAGE.split("`payload.version` has")[1].split("\n## ")[0]
    assert set(versions[0]) == {field.name for field in fields(ModelVersion)}
    assert set(versions[0]) <= words(described)


def test_its_examples_run(registry: Registry) -> None:
    first, last = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    known: dict[str, Any] = {}
    exec(first.replace(HOME, registry.uri), known)
    assert known["moves"]["kind"].to_pylist()[0] == "rolled_back"
    assert known["moves"].num_rows == 9
    exec(last.replace(HOME, registry.uri).replace("2026, 5", "9999, 5"), known)
    assert known["then"].aliases == {"challenger": 2}


def test_its_example_by_duckdb_runs(registry: Registry) -> None:
    duckdb, delta = (pytest.importorskip(name) for name in ("duckdb", "duckdb_extension_delta"))
    extension = next(Path(delta.__file__).parent.rglob("*.duckdb_extension"))
    (query,) = re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)
    connection = duckdb.connect()
    connection.execute(f"LOAD '{extension}'")
    told = connection.execute(query.replace(HOME, registry.uri)).fetchall()
    assert [row[1] for row in told] == [1, 2, 3]
    assert json.loads(told[0][3]) == {"f1": 1.0}
