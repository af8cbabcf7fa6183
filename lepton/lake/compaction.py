"""Files written anew with the same rows, in one commit that changes none of them.

All new files have page checksums and complete statistics from the first. Rows keep their order, or
are put along a Z curve (:mod:`lepton.lake.curve`), a range of the curve at a time, so that memory
holds about :data:`SORTED_BYTES` of rows however large the table is.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError

from lepton.lake.commit import commit_changes, discard, landed, verify
from lepton.lake.curve import Curve, curve_of
from lepton.lake.files import Written
from lepton.lake.log import DataFile, Version
from lepton.lake.replacement import Target
from lepton.lake.rows import align
from lepton.lake.rules import Rules
from lepton.lake.storage import opened_table

SORTED_BYTES = 2**30
"""Arrow bytes that are sorted at once."""


def commit_anew(
    opened: DeltaTable,
    rules: Rules,
    version: Version,
    groups: Sequence[Sequence[DataFile]],
    *,
    options: Mapping[str, str] | None = None,
    curve: tuple[Sequence[str], int] | None = None,
) -> bool:
    """Write the rows of each group of files anew, together; False where another commit was first.

    Args:
        opened: the version's handle.
        rules: of the table.
        version: whose files they are.
        groups: files of one partition each.
        options: as deltalake takes them.
        curve: the columns of a Z curve to put rows along, and the bytes of a file.

    Raises:
        LakeError: a file cannot be read, or the commit failed; the table is as it was.
    """
    target = Target(version=version.without_files(), rules=rules, options=options, job="")
    mark, written, sent = uuid.uuid4().hex, list[Written](), False
    try:
        for files in groups:
            for rows in _tables(target, files, version.sizes(), curve):
                written += target.write(rows)
        verify(written, version.uri, options)
        gone, sent = [f for g in groups for f in g], True
        commit_changes(
            opened,
            rules,
            written,
            gone,
            uri=version.uri,
            options=options,
            operation="OPTIMIZE",
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


def _rows(target: Target, file: DataFile) -> pa.Table:
    return align(target.rows(file), target.rules.schema)


def _tables(
    target: Target,
    files: Sequence[DataFile],
    sizes: Mapping[str, int],
    curve: tuple[Sequence[str], int] | None,
) -> Iterator[pa.Table]:
    """The files' rows, all together or along a curve in tables of as many bytes as a file's.

    The columns of the curve are read first, of all files; then, for each range of the curve that
    memory holds, the files with rows in it.
    """
    if curve is None:
        yield pa.concat_tables([_rows(target, f) for f in files])
        return
    columns, target_bytes = curve
    view = replace(target.view(), columns=tuple(columns))
    keys = [target.rows(f, view) for f in files]
    starts = np.cumsum([0, *(len(k) for k in keys)]).tolist()
    order = np.argsort(curve_of(pa.concat_tables(keys)), kind="stable").astype(np.int64)
    stored = sum(sizes[f.path] for f in files)
    per_file = max(1, len(order) * target_bytes // max(1, stored))
    for wanted in _ranges(target, files, order, stored):
        rows = _gathered(target, files, wanted, starts)
        for start in range(0, len(rows), per_file):
            yield rows.slice(start, per_file)


def _ranges(
    target: Target, files: Sequence[DataFile], order: Curve, stored: int
) -> Iterator[Curve]:
    """The order in pieces whose rows memory holds together."""
    step = len(order)
    if stored * 16 > SORTED_BYTES:
        first = max(files, key=lambda f: f.rows or 0)
        rows = _rows(target, first)
        step = max(1, SORTED_BYTES * len(rows) // max(1, rows.nbytes))
    for start in range(0, len(order), step):
        yield order[start : start + step]


def _gathered(
    target: Target, files: Sequence[DataFile], wanted: Curve, starts: Sequence[int]
) -> pa.Table:
    """The rows of some numbers, in that order; a row's number counts through all files."""
    pieces: list[pa.Table] = []
    numbers = np.sort(wanted)
    for file, start, stop in zip(files, starts[:-1], starts[1:], strict=True):
        first, last = np.searchsorted(numbers, [start, stop])
        if first < last:
            here: Any = pa.array(numbers[first:last] - start)
            pieces.append(_rows(target, file).take(here))
    places: Any = pa.array(np.searchsorted(numbers, wanted))
    return pa.concat_tables(pieces).take(places)
