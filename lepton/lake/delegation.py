"""Changes that deltalake makes: where a table has a change data feed, deletion vectors, odd paths.

Its files have no page checksums, so those that it wrote are written anew as they are by a second
commit, which changes no row; where others commit meanwhile, the files may stay as they were.
"""

from __future__ import annotations

import logging
import random
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError

from lepton.errors import LakeError
from lepton.lake.commit import (
    ATTEMPTS,
    commit_changes,
    conflict,
    discard,
    landed,
    properties_of,
    reached,
    removable,
    verify,
)
from lepton.lake.history import first_line
from lepton.lake.log import DataFile, Version, load_version
from lepton.lake.read import OpenFile
from lepton.lake.replacement import Target
from lepton.lake.rows import align
from lepton.lake.rules import Rules, rules_of
from lepton.lake.spelling import refuse_respelled
from lepton.lake.storage import opened_table

_TRIES = 5

log = logging.getLogger("lepton")


def delegate(
    opened: DeltaTable,
    rules: Rules,
    rows: pa.Table,
    *,
    uri: str,
    key: Sequence[str],
    where: str | None,
    txn: tuple[str, int] | None,
    options: Mapping[str, str] | None,
    deletes: bool = False,
) -> None:
    """Merge rows (aligned, checked) by ``key``, delete by it, or replace those of ``where``.

    Raises:
        WriteConflict: other commits came first each time, or changed the table's rules.
        LakeError: deltalake could not remove a file; nothing was written.
    """
    refuse_respelled(opened, rules.what)
    mark = uuid.uuid4().hex
    properties = properties_of(txn, mark)
    since, newest = opened.version(), opened
    failure: Exception | None = None
    for attempt in range(ATTEMPTS if where is None else 1):
        if attempt:
            time.sleep(random.uniform(0, min(2.0, 0.05 * 2**attempt)))  # noqa: S311 (no secret)
            opened = opened_table(uri, options)
        try:
            if where is None:
                _merge(opened, rows, key, properties, deletes=deletes)
            else:
                _replace(opened, rows, where, properties)
        except CommitFailedError as e:
            failure = e
        else:
            reseal(uri, since, options)
            return
        newest = opened_table(uri, options)
        if reached(newest, txn) or landed(uri, since, newest.version(), mark, options):
            return  # by another process, or by this one and the answer was lost on the way
        if replace(rules_of(newest, uri), what=rules.what) != rules:
            break
    raise conflict(newest, since, uri) from failure


def _merge(
    opened: DeltaTable,
    rows: pa.Table,
    key: Sequence[str],
    properties: CommitProperties,
    *,
    deletes: bool,
) -> None:
    condition = " AND ".join(f"target.`{n}` = source.`{n}`" for n in key)
    merger = opened.merge(
        rows,
        condition,
        source_alias="source",
        target_alias="target",
        commit_properties=properties,
    )
    if deletes:
        merger.when_matched_delete().execute()
    else:
        merger.when_matched_update_all().when_not_matched_insert_all().execute()


def _replace(opened: DeltaTable, rows: pa.Table, where: str, properties: CommitProperties) -> None:
    commit: Any = write_deltalake  # its overloads tie predicate to one mode
    commit(opened, rows, mode="overwrite", predicate=where, commit_properties=properties)


def reseal(uri: str, since: int, options: Mapping[str, str] | None) -> None:
    """Write files without page checksums that came after a version anew; rows stay as they are.

    The change itself is committed: where it does not come to this, nothing is lost, and it is said.
    """
    pairs = tuple(sorted((options or {}).items()))
    why = "other commits came first each time"
    try:
        old = {f.path for f in load_version(uri, since, pairs).files}
        for _ in range(_TRIES):
            opened = opened_table(uri, options)
            rules, version = rules_of(opened, uri), load_version(uri, opened.version(), pairs)
            new = [f for f in version.files if f.path not in old and removable(f)]
            bare = [f for f in new if not _checked(version, f, options)]
            if not bare or commit_anew(
                opened, rules, version, [[f] for f in bare], "RESEAL", options=options
            ):
                return
    except (DeltaError, LakeError, OSError, ValueError) as e:
        why = first_line(e)
    log.warning(
        "%s: files written after version %d have no page checksums (%s); lepton optimize rewrites "
        "small ones with them",
        *(uri, since, why),
    )


def commit_anew(
    opened: DeltaTable,
    rules: Rules,
    version: Version,
    groups: Sequence[Sequence[DataFile]],
    operation: str,
    *,
    options: Mapping[str, str] | None = None,
    sort: Callable[[pa.Table], pa.Table] | None = None,
) -> bool:
    """Write the rows of each group of files anew, together; False where another commit was first.

    Raises:
        LakeError: a file cannot be read, or the commit failed; the table is as it was.
    """
    target = Target(version=version.without_files(), rules=rules, options=options, job="")
    mark, written, sent = uuid.uuid4().hex, list[Any](), False
    try:
        for group in groups:
            rows = pa.concat_tables([align(target.rows(f), rules.schema) for f in group])
            written += target.write(rows if sort is None else sort(rows))
        verify(written, version.uri, options)
        gone, sent = [f for g in groups for f in g], True
        commit_changes(
            opened,
            rules,
            written,
            gone,
            operation=operation,
            txn=None,
            mark=mark,
            data_change=False,
        )
    except BaseException as e:
        if sent:
            newest = opened_table(version.uri, options)
            if landed(version.uri, version.number, newest.version(), mark, options):
                return True
        lost = isinstance(e, CommitFailedError)
        if lost or not sent:  # else the commit may still land, and would name them
            discard(written, version.uri, options)
        if lost:
            return False
        raise
    return True


def _checked(version: Version, file: DataFile, options: Mapping[str, str] | None) -> bool:
    opened = OpenFile(version, file, options)
    try:
        return opened.checked()
    finally:
        opened.close()
