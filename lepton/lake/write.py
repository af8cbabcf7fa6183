"""Writing to Delta in one commit: all of it or none of it, and with ``txn`` only once.

All data files are ours: page checksums, complete statistics.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
from deltalake import DeltaTable, Schema
from deltalake.exceptions import DeltaError

from lepton.errors import LakeError
from lepton.lake.commit import commit_files, conflict, create, discard, reached
from lepton.lake.evolution import Evolution, Evolve, evolution, widened_json
from lepton.lake.fields import fields_of
from lepton.lake.files import Written
from lepton.lake.growth import add_columns, grows, rules_after
from lepton.lake.kinds import storable
from lepton.lake.log import damaged
from lepton.lake.rewrite import Change, Operation, rewrite, written_wider
from lepton.lake.rows import check_names
from lepton.lake.rules import Rules, rules_of
from lepton.lake.snapshot import Snapshot, table
from lepton.lake.source import Place, Rows
from lepton.lake.spelling import refuse_respelled
from lepton.lake.storage import opened_table, table_or_none

Mode = Literal["append", "overwrite", "merge", "delete", "replace_where"]
_OPERATIONS: dict[Mode, Operation] = {
    "merge": "MERGE",
    "delete": "DELETE",
    "replace_where": "REPLACE",
}


def write(
    data: Any,
    uri: str | os.PathLike[str],
    *,
    mode: Mode = "append",
    key: str | Sequence[str] | None = None,
    where: str | None = None,
    partition_by: Sequence[str] | None = None,
    txn: tuple[str, int] | None = None,
    evolve: Evolve | None = None,
    storage_options: Mapping[str, str] | None = None,
) -> Snapshot:
    """Write rows to a Delta table in one commit and return the snapshot that holds them.

    Columns, types, NULLs and constraints are checked before the commit: columns must be the
    table's (but see ``evolve``), and a type changes only where every value stays the same.

    Args:
        data: an Arrow table or reader, a pandas frame, or a Ray Dataset, whose rows are written
            by Ray tasks where they are (only the keys of ``merge`` and ``delete`` come here).
        uri: the table; made when it is not there yet (by ``append``, ``overwrite``, ``merge``).
        mode: ``append``; ``overwrite`` every row; ``merge`` updates rows with an equal key and
            inserts the rest, ``delete`` takes rows with an equal key away, and both do so again
            where another commit came first; ``replace_where`` replaces exactly the rows that
            match ``where``.
        key: column or columns that identify a row, for ``merge`` and ``delete``.
        where: SQL condition, for ``replace_where``.
        partition_by: partition columns of a new table.
        txn: (application id, version): a write whose version this application has already
            reached is skipped, so that retrying is safe.
        evolve: let the table's schema grow, for ``append`` and ``overwrite``: ``add`` adds the
            columns that it does not have, NULL in older rows, in a commit of their own just
            before the rows'; ``widen`` also takes wider types, where the table has type widening
            on, so that files stay, or ``overwrite`` writes every file anew; ``rewrite`` does that
            for ``append``, in one commit that loses to any other.
        storage_options: as deltalake takes them.

    Raises:
        ValueError: arguments that do not go together.
        WriteConflict: another writer's commit came first and does not go with this one.
        LakeError: the rows do not fit the table, or the commit failed; nothing was written.
    """
    path = os.fspath(uri)
    if "://" not in path:
        path = str(Path(path).absolute())
    path = path.removeprefix("file://").rstrip("/")
    options = dict(storage_options) if storage_options else None
    asked = _Asked(
        path=path,
        mode=mode,
        key=(key,) if isinstance(key, str) else tuple(key or ()),
        where=where,
        partition_by=None if partition_by is None else tuple(partition_by),
        txn=_transaction(txn),
        evolve=evolve,
        options=options,
    )
    try:
        _write(data, asked)
    except (DeltaError, OSError, ValueError, pa.ArrowException) as e:
        raise LakeError(f"cannot write to {path!r}; nothing was committed: {e}") from e
    return table(path, storage_options=options)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """What :func:`write` was asked, checked; names as there."""

    path: str
    mode: Mode
    key: tuple[str, ...]
    where: str | None
    partition_by: tuple[str, ...] | None
    txn: tuple[str, int] | None
    evolve: Evolve | None
    options: dict[str, str] | None = field(repr=False)

    def __post_init__(self) -> None:
        mode, evolve = self.mode, self.evolve
        modes = get_args(Mode)
        if mode not in modes:
            raise ValueError(f"mode {mode!r} is none of {', '.join(modes)}")
        if (mode in ("merge", "delete")) != bool(self.key):
            raise ValueError("key= names the identifying columns of mode='merge' or 'delete' only")
        if (mode == "replace_where") != (self.where is not None):
            raise ValueError("where= is the condition of mode='replace_where', and only of it")
        if evolve not in (None, *get_args(Evolve)):
            raise ValueError(f"evolve {evolve!r} is none of {', '.join(get_args(Evolve))}")
        if evolve and mode in _OPERATIONS:
            raise ValueError(f"evolve= goes with append and overwrite, not with mode={mode!r}")


def _transaction(txn: Any) -> tuple[str, int] | None:
    """An application transaction, checked before any work."""
    if txn is None:
        return None
    try:
        name, number = txn
        version = operator.index(number)
    except (TypeError, ValueError):
        name, version = "", -1
    if not isinstance(name, str) or not name or not 0 <= version < 2**63:
        raise ValueError(
            f"txn={txn!r} is no transaction: give (application id, version), such as ('job', 7)"
        )
    return name, version


def _write(data: Any, asked: _Asked) -> None:
    path, options = asked.path, asked.options
    opened = _opened(path, options)
    if opened is None and asked.mode in ("replace_where", "delete"):
        raise LakeError(f"no Delta table at {path!r} for {asked.mode} to change")
    if opened is not None and reached(opened, asked.txn):
        return
    place = Place(
        path=path,
        options=options,
        key=asked.key,
        where=asked.where,
        deletes=asked.mode == "delete",
    )
    rows = Rows(data, place)
    if opened is None:
        rules = _new_rules(rows.needed_schema(), path, asked.partition_by)
    else:
        rules = rules_of(opened, path)
        _check_partitions(rules, asked.partition_by)
    try:
        if rules.append_only and asked.mode != "append":
            raise LakeError(f"it is append-only, so mode={asked.mode!r} is refused")
        grown = _grown(rows, rules, asked)
        if opened is not None and (grown.added or grown.widened):
            _check_growth(opened, rules, grown, asked)
        if opened is not None and asked.mode in _OPERATIONS:
            _rewrite(opened, rules, rows, asked)
            return
        files = _files(opened, rows, rules, grown, asked)
    except LakeError as e:
        if type(e) is not LakeError:
            raise
        raise LakeError(f"cannot write to table {rules.what}; nothing was committed: {e}") from e
    if opened is None:
        _make(rules, rows, files, asked)
    else:
        _commit(opened, rules, grown, files, asked)


def _check_growth(opened: DeltaTable, rules: Rules, grown: Evolution, asked: _Asked) -> None:
    if rules.own and grown.widened and not rules.widening:
        raise LakeError(
            "its schema has parts that wider types would lose (mapped names, column defaults or "
            "widened types): set the table property delta.enableTypeWidening with the engine that "
            "made it, or use evolve='add'"
        )
    if asked.mode == "overwrite" and not rules.own:
        refuse_respelled(opened, rules.what)


def _opened(path: str, options: dict[str, str] | None) -> DeltaTable | None:
    try:
        return table_or_none(path, options)
    except (DeltaError, OSError, ValueError) as e:
        raise LakeError(f"nothing was committed: {damaged(path, options, e)}") from e


def _make(rules: Rules, rows: Rows, files: Sequence[Written], asked: _Asked) -> None:
    """Make the table; where another process was first, write to its one."""
    if create(asked.path, rules, files, asked.txn, asked.options):
        return
    opened, rules = _made_meanwhile(asked.path, rules, files, asked.options)
    if asked.mode == "merge":
        discard(files, asked.path, asked.options)
        _rewrite(opened, rules, rows, asked)
    else:
        _commit(opened, rules, Evolution(schema=rules.schema), files, asked)


def _rewrite(opened: DeltaTable, rules: Rules, rows: Rows, asked: _Asked) -> None:
    source = rows.source(rules)
    change = Change(
        operation=_OPERATIONS[asked.mode],
        where=asked.where,
        txn=asked.txn,
        uri=asked.path,
        options=asked.options,
    )
    rewrite(opened, rules, source, change)


def _commit(
    opened: DeltaTable,
    rules: Rules,
    grown: Evolution,
    files: Sequence[Written],
    asked: _Asked,
) -> None:
    path, options = asked.path, asked.options
    if reached(opened, asked.txn):
        discard(files, path, options)
        return
    wider = bool(grown.widened) and not rules.widening
    anew = wider and asked.mode == "append"
    if grows(rules, grown) and not anew:
        opened, rules = add_columns(opened, rules, grown, files, uri=path, options=options)
    text = opened.schema().to_json()
    if wider:
        text = widened_json(text, grown.widened, Schema.from_arrow(grown.schema).to_json())
    commit_files(
        opened,
        rules,
        files,
        uri=path,
        mode="overwrite" if anew or asked.mode == "overwrite" else "append",
        next_only=anew,
        txn=asked.txn,
        schema=Schema.from_json(text) if wider else None,
        options=options,
    )


def _files(
    opened: DeltaTable | None, rows: Rows, rules: Rules, grown: Evolution, asked: _Asked
) -> list[Written]:
    """Write the rows, and where types become wider for an append all rows of the table anew."""
    wider = replace(rules, schema=grown.schema)
    if opened is not None:
        wider = rules_after(opened, rules, grown)
    files = rows.write(wider)
    stays = rules.widening or not grown.widened
    if opened is None or stays or asked.mode != "append":
        return files
    try:
        if rules.append_only or rules.feed:
            why = "append-only" if rules.append_only else "keeping a change data feed"
            raise LakeError(f"it is {why}, so evolve='rewrite' is refused")
        refuse_respelled(opened, rules.what)
        return files + written_wider(opened, wider, asked.path, asked.options)
    except BaseException:
        discard(files, asked.path, asked.options)
        raise


def _grown(rows: Rows, rules: Rules, asked: _Asked) -> Evolution:
    """What becomes of the schema; the rows' columns are checked as far as they are known."""
    grown = Evolution(schema=rules.schema)
    if asked.evolve:
        grown = evolution(
            rules.schema,
            rows.needed_schema(),
            asked.evolve,
            partition_columns=rules.partition_columns,
            anew=asked.mode == "overwrite" or asked.evolve == "rewrite" or rules.widening,
        )
    if rows.schema is not None:
        check_names(rows.schema.names, grown.schema, fill=asked.mode == "delete")
    return grown


def _made_meanwhile(
    path: str, rules: Rules, files: Sequence[Written], options: dict[str, str] | None
) -> tuple[DeltaTable, Rules]:
    """Open the table that another process made first, if it is the same kind of table."""
    opened = opened_table(path, options)
    made = rules_of(opened, path)
    same = (made.schema, made.partition_columns) == (rules.schema, rules.partition_columns)
    if not same or made.constraints:
        discard(files, path, options)
        raise conflict(opened, -1, path)
    return opened, made


def _check_partitions(rules: Rules, partition_by: Sequence[str] | None) -> None:
    if partition_by is not None and tuple(partition_by) != rules.partition_columns:
        raise LakeError(
            f"table {rules.what} is partitioned by {list(rules.partition_columns)}, not by "
            f"{list(partition_by)}; nothing was written: leave partition_by= out"
        )


def _new_rules(given: pa.Schema, path: str, partition_by: Sequence[str] | None) -> Rules:
    parts = tuple(partition_by or ())
    unknown = [p for p in parts if p not in given.names]
    if unknown:
        raise LakeError(f"new table {path!r}: no column {unknown} to partition by")
    try:
        kept = storable(given)
        if parts and set(parts) == set(given.names):
            raise LakeError("every column is a partition column, so files would have no rows")
    except LakeError as e:
        raise LakeError(f"cannot make table {path!r}; nothing was written: {e}") from e
    fields = fields_of(Schema.from_arrow(kept).to_json(), "none")
    return Rules(
        what=f"{path!r} (new)",
        schema=pa.schema([f.arrow() for f in fields]),
        partition_columns=parts,
        constraints={},
    )
