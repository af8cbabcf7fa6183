"""Rows that take other rows' places, file by file: what of a merge or a deletion a task can do.

Data files never change, so what is worked out for one holds for as long as the file is in the
table, whatever other commits come meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from lepton.lake.changes import KIND
from lepton.lake.fields import POSITION
from lepton.lake.files import Written, write_files
from lepton.lake.log import DataFile, Version
from lepton.lake.rows import align, comparable
from lepton.lake.rules import Rules
from lepton.lake.snapshot import Snapshot
from lepton.lake.statistics import bounds_of

pc: Any = pyarrow.compute  # its stubs know no arrays of unknown type
Ints = np.ndarray[Any, np.dtype[np.int64]]
Fetch = Callable[[Any], pa.Table]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The table to change, as a task needs it: small, however large the table.

    Attributes:
        version: the version that is read, without its files.
        rules: what rows must be.
        options: as deltalake takes them.
        job: what the names of new files begin with.
    """

    version: Version
    rules: Rules
    options: Mapping[str, str] | None = field(repr=False)
    job: str

    def view(self) -> Snapshot:
        """Return the version as a snapshot, to read files of it."""
        return Snapshot(
            uri=self.version.uri,
            version=self.version.number,
            options=tuple(sorted((self.options or {}).items())),
        )

    def rows(self, file: DataFile, snapshot: Snapshot | None = None) -> pa.Table:
        """Return the live rows of a file, of a view of it if given, in the table's order."""
        view = snapshot or self.view()
        return view.read_part(self.version, file).drop_columns(POSITION)

    def write(self, rows: pa.Table) -> list[Written]:
        """Write rows as data files."""
        columns, uri = self.rules.partition_columns, self.version.uri
        fields = self.rules.stored
        return write_files(rows, uri, columns, self.options, job=self.job, fields=fields)

    def tell(self, **changed: pa.Table) -> list[Written]:
        """Write what became of rows, by kind of change, as change data where the table keeps it."""
        kinds = [(k, rows) for k, rows in changed.items() if len(rows)]
        if not self.rules.feed or not kinds:
            return []
        told = [rows.append_column(KIND, pa.array([k] * len(rows))) for k, rows in kinds]
        columns, uri = self.rules.partition_columns, self.version.uri
        whole = pa.concat_tables(told)
        fields = self.rules.stored
        return write_files(
            whole, uri, columns, self.options, job=self.job, feed=True, fields=fields
        )


def candidates(version: Version, keys: pa.Table) -> list[DataFile]:
    """Return the files that may hold a row with one of the keys, by the log's statistics."""
    may = np.ones(len(version.files), bool)
    bounds = bounds_of(version, set(keys.column_names))
    for name, known in bounds.items():
        if name not in keys.column_names or pa.types.is_floating(known.low.type):
            continue
        ends = pc.min_max(keys[name])
        for beyond in (pc.greater(known.low, ends["max"]), pc.less(known.high, ends["min"])):
            may &= ~np.asarray(pc.fill_null(beyond, False).to_numpy(zero_copy_only=False), bool)
    return [version.files[i] for i in np.flatnonzero(may)]


def matched(target: Target, file: DataFile, keys: pa.Table) -> Ints | None:
    """Return for each live row of a file the number of the key it has, -1 for none of them.

    None stands for a file in which no row has one.
    """
    names = keys.column_names
    view = replace(target.view(), columns=tuple(names))
    rows = comparable(target.rows(file, view), names)
    here = rows.append_column("\0row", pa.array(np.arange(len(rows))))
    there = _within(keys.append_column("\0key", pa.array(np.arange(len(keys)))), rows)
    both = here.join(there, keys=names, join_type="inner", use_threads=False)
    if len(both) == 0:
        return None
    found = np.full(len(rows), -1, np.int64)
    found[both["\0row"].to_numpy()] = both["\0key"].to_numpy()
    return found


def _within(keys: pa.Table, rows: pa.Table) -> pa.Table:
    """Leave out keys that are beyond the rows' least and greatest: the fewer the sooner joined."""
    for name in rows.column_names:
        kind: Any = rows[name].type
        if pa.types.is_integer(kind) or pa.types.is_temporal(kind) or pa.types.is_string(kind):
            ends = pc.min_max(rows[name])
            low = pc.greater_equal(keys[name], ends["min"])
            keys = keys.filter(pc.and_(low, pc.less_equal(keys[name], ends["max"])))
    return keys


def replaced(
    target: Target,
    file: DataFile,
    found: Ints,
    blocks: Sequence[Any] | None,
    starts: Ints,
    fetch: Fetch,
) -> list[Written]:
    """Write a file's rows anew, those with a key as the blocks have them; without blocks not.

    Args:
        target: the table.
        file: of it.
        found: as :func:`matched` gives it.
        blocks: the new rows, in pieces that ``fetch`` gets one at a time.
        starts: the number of each block's first row.
        fetch: gets a block.
    """
    rows = align(target.rows(file), target.rules.schema)
    old = rows.filter(pa.array(found >= 0)) if target.rules.feed else rows.slice(0, 0)
    if blocks is None:
        return target.write(rows.filter(pa.array(found < 0))) + target.tell(delete=old)
    pieces, order = [rows], np.arange(len(rows))
    owners = np.where(found < 0, -1, np.searchsorted(starts, found, side="right") - 1)
    count = len(rows)
    for owner in np.unique(owners[owners >= 0]):
        at = np.flatnonzero(owners == owner)
        pieces.append(fetch(blocks[owner]).take(_numbers(found[at] - starts[owner])))
        order[at] = np.arange(count, count + len(at))
        count += len(at)
    new = pa.concat_tables(pieces[1:]) if target.rules.feed else old
    told = target.tell(update_preimage=old, update_postimage=new)
    return target.write(pa.concat_tables(pieces).take(_numbers(order))) + told


def _numbers(values: Ints) -> Any:
    return pa.array(values, pa.int64())


def inserted(
    target: Target, parts: Sequence[tuple[Any, np.ndarray[Any, Any] | None]], fetch: Fetch
) -> list[Written]:
    """Write blocks of new rows together: of each those that its mask has, or all."""
    rows = pa.concat_tables(_chosen(parts, fetch))
    return target.write(rows) + target.tell(insert=rows)


def without(target: Target, file: DataFile, view: Snapshot) -> list[Written] | None:
    """Write a file's rows anew without those that a view has; None where it has none of them."""
    whole = target.view().read_part(target.version, file)
    gone = view.read_part(target.version, file)[POSITION]
    if len(gone) == 0:
        return None
    goes = pc.is_in(whole[POSITION], gone.combine_chunks())
    rows = align(whole.drop_columns(POSITION), target.rules.schema)
    return target.write(rows.filter(pc.invert(goes))) + target.tell(delete=rows.filter(goes))


def _chosen(
    parts: Sequence[tuple[Any, np.ndarray[Any, Any] | None]], fetch: Fetch
) -> Iterator[pa.Table]:
    for block, mask in parts:
        rows = fetch(block)
        yield rows if mask is None else rows.filter(pa.array(mask))
