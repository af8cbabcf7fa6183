"""Columns that a table gets, or wider types, in a commit just before the rows that need them.

deltalake adds them where it can, and lepton in its own hand where the table has parts that
deltalake does not write, such as mapped names.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable, Schema
from deltalake.exceptions import CommitFailedError, DeltaError

from lepton.errors import LakeError
from lepton.lake.commit import ATTEMPTS, conflict, discard
from lepton.lake.evolution import LAST_ID, Evolution, grown_json
from lepton.lake.files import Written
from lepton.lake.history import first_line
from lepton.lake.journal import info_of, keep_short, publish, stamp
from lepton.lake.mapping import storing
from lepton.lake.rules import Rules, rules_of
from lepton.lake.storage import opened_table, passes


def grows(rules: Rules, grown: Evolution) -> bool:
    """Whether a schema changes while the table's files stay."""
    return bool(grown.added or (grown.widened and rules.widening))


def rules_after(opened: DeltaTable, rules: Rules, grown: Evolution) -> Rules:
    """Return the rules that a table will have, by which its new files are written."""
    after = replace(rules, schema=grown.schema)
    if not rules.stored or not grows(rules, grown):
        return after
    return replace(after, stored=storing(_schema(opened, grown)[0]))


def add_columns(
    opened: DeltaTable,
    rules: Rules,
    grown: Evolution,
    files: Sequence[Written],
    *,
    uri: str,
    options: Mapping[str, str] | None,
) -> tuple[DeltaTable, Rules]:
    """Give a table new columns and return it with its rules; another writer may have done so.

    It is tried again for as long as other commits come first that leave the table's rules alone.

    Raises:
        WriteConflict: another commit gave the table other rules, or commits came first each time.
        LakeError: deltalake cannot add such a column, or the table asks for what lepton does not
            do by now; the files are discarded.
    """
    if not rules.widening:  # then types change where the files do
        kept: Any = rules.schema
        grown = replace(grown, schema=pa.schema([*kept, *grown.added]), widened={})
    wanted = rules_after(opened, rules, grown)
    since, failure, lost = opened.version(), None, False
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(random.uniform(0, min(2.0, 0.02 * 2**attempt)))  # noqa: S311 (no secret)
        failure = _added(opened, rules, grown, uri, options)
        lost = isinstance(failure, CommitFailedError)
        if failure is not None and not lost and not passes(failure):
            break
        opened = opened_table(uri, options)
        try:
            now = rules_of(opened, uri)
        except LakeError:
            discard(files, uri, options)
            raise
        if replace(now, what=rules.what) == wanted:
            return opened, now
        same = replace(now, what=rules.what) == rules
        if failure is None or not same or rules_after(opened, rules, grown) != wanted:
            break
    discard(files, uri, options)
    if failure is None or lost:
        raise conflict(opened, since, uri) from failure
    raise LakeError(
        f"cannot add or widen {', '.join([*(f.name for f in grown.added), *grown.widened])} of "
        f"table {rules.what}; nothing was committed: {first_line(failure)}"
    ) from failure


def _added(
    opened: DeltaTable, rules: Rules, grown: Evolution, uri: str, options: Mapping[str, str] | None
) -> Exception | None:
    """Add columns in a commit of their own; return why that failed, if it did."""
    new: Any = Schema.from_arrow(pa.schema(grown.added)).fields
    try:
        if rules.own:
            _publish(opened, rules, grown, uri, options)
        else:
            opened.alter.add_columns(new)
    except (DeltaError, OSError, ValueError) as e:
        return e
    return None


def _publish(
    opened: DeltaTable, rules: Rules, grown: Evolution, uri: str, options: Mapping[str, str] | None
) -> None:
    """Commit the table's description with more columns as the next version."""
    number = opened.version() + 1
    text, last = _schema(opened, grown)
    known = opened.metadata()
    configuration = dict(known.configuration)
    if rules.stored:
        configuration[LAST_ID] = str(last)
    described: dict[str, Any] = {
        "id": str(known.id),
        "name": known.name,
        "description": known.description,
        "format": {"provider": "parquet", "options": {}},
        "schemaString": text,
        "partitionColumns": list(known.partition_columns),
        "createdTime": known.created_time,
        "configuration": configuration,
    }
    stamped = stamp(uri, opened.version(), options) if rules.stamped else {}
    told = info_of(
        "CHANGE COLUMN" if grown.widened else "ADD COLUMNS",
        {**stamped, "readVersion": opened.version()},
    )
    kept = {k: v for k, v in described.items() if v is not None}
    publish(uri, number, [told, {"metaData": kept}], options)
    keep_short(uri, number, options)


def _schema(opened: DeltaTable, grown: Evolution) -> tuple[str, int]:
    """The schema with the new columns, and the last id that it gives."""
    known = opened.metadata()
    properties = known.configuration
    mapped = str(properties.get("delta.columnMapping.mode", "none")) != "none"
    wider: list[Any] = [grown.schema.field(name) for name in grown.widened]
    return grown_json(
        opened.schema().to_json(),
        Schema.from_arrow(pa.schema([*grown.added, *wider])).to_json(),
        widened=grown.widened,
        last=int(properties.get(LAST_ID) or 0) if mapped else None,
        table=str(known.id),
    )
