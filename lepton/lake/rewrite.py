"""Merge and replace_where, which deltalake does: files that change are written anew.

A merge is the same call whatever was there before, so where another commit came first it is tried
again. A replacement would take away rows that it had not seen, so there the other commit wins.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError

from lepton.lake.commit import ATTEMPTS, conflict, landed, properties_of, reached
from lepton.lake.rules import Rules, rules_of


def rewrite(
    opened: DeltaTable,
    rules: Rules,
    rows: pa.Table,
    *,
    uri: str,
    key: Sequence[str],
    where: str | None,
    txn: tuple[str, int] | None,
    options: Mapping[str, str] | None,
) -> None:
    """Merge rows (aligned, checked) by ``key``, or put them in the place of those of ``where``.

    Raises:
        WriteConflict: other commits came first each time, or changed the table's rules.
    """
    mark = uuid.uuid4().hex
    properties = properties_of(txn, mark)
    since, newest = opened.version(), opened
    failure: Exception | None = None
    for attempt in range(ATTEMPTS if where is None else 1):
        if attempt:
            time.sleep(random.uniform(0, min(2.0, 0.05 * 2**attempt)))  # noqa: S311 (no secret)
            opened = DeltaTable(uri, storage_options=dict(options) if options else None)
        try:
            if where is None:
                _merge(opened, rows, key, properties)
            else:
                _replace(opened, rows, where, properties)
        except CommitFailedError as e:
            failure = e
        else:
            return
        newest = DeltaTable(uri, storage_options=dict(options) if options else None)
        if reached(newest, txn) or landed(uri, since, newest.version(), mark, options):
            return  # by another process, or by this one and the answer was lost on the way
        if replace(rules_of(newest, uri), what=rules.what) != rules:
            break
    raise conflict(newest, since, uri) from failure


def _merge(
    opened: DeltaTable, rows: pa.Table, key: Sequence[str], properties: CommitProperties
) -> None:
    condition = " AND ".join(f"target.`{n}` = source.`{n}`" for n in key)
    (
        opened.merge(
            rows,
            condition,
            source_alias="source",
            target_alias="target",
            commit_properties=properties,
        )
        .when_matched_update_all()
        .when_not_matched_insert_all()
        .execute()
    )


def _replace(opened: DeltaTable, rows: pa.Table, where: str, properties: CommitProperties) -> None:
    commit: Any = write_deltalake  # its overloads tie predicate to one mode
    commit(opened, rows, mode="overwrite", predicate=where, commit_properties=properties)
