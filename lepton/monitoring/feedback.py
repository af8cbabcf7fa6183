"""Closing the loop: the inference log joined with labels is the next training table."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from lepton.errors import LakeError
from lepton.lake import Snapshot, home_of, table, write
from lepton.lake.read import POSITION
from lepton.monitoring.answers import answers_of

KEY = ("request_id", "row")


def feedback(
    model: str,
    *,
    labels: str | os.PathLike[str] | Snapshot,
    key: str | Sequence[str] | None = None,
    home: str | None = None,
) -> Snapshot:
    """Join a model's inference log with labels and keep the result as ``feedback/<model>``.

    Each answered row that has a label is in the result once, however often this is called: rows
    are merged by (request_id, row), so a corrected label replaces the former one.

    Args:
        model: the registered name.
        labels: a table with ``request_id`` (and ``row``, where requests had several rows) and
            the label columns.
        key: other columns to join on, which both tables must have.
        home: where the inference log is.

    Returns:
        The feedback table: request_id, row, time, version, the inputs as they came, the answers,
        and the label columns.

    Raises:
        LakeError: no inference log, no key column, or no answer matches a label.
    """
    log = answers_of(model, home)
    if log is None:
        raise LakeError(f"model {model!r} has no inference log in {home_of(home)} yet")
    given = labels if isinstance(labels, Snapshot) else table(labels)
    on = _key(key, given)
    added = [c for c in given.schema.names if c not in log.schema.names]
    if not added:
        raise LakeError(f"the labels {given} add no column to the inference log of {model!r}")
    answered = (
        log.where("status = 200 AND variant <> 'shadow'")
        .to_arrow()
        .drop_columns(["status", "variant", "latency_ms"])
    )
    known = _newest(_by_age(given.select([*on, *added])), on)
    matched = _inner(answered, known, on)
    if not len(matched):
        raise LakeError(f"no answer of {model!r} matches a label of {given} by {', '.join(on)}")
    return write(matched, f"{home_of(home)}/feedback/{model}", mode="merge", key=KEY)


def _key(key: str | Sequence[str] | None, labels: Snapshot) -> list[str]:
    names = [key] if isinstance(key, str) else list(key or ())
    if not names:
        names = [c for c in KEY if c in labels.schema.names]
    missing = [c for c in names if c not in labels.schema.names]
    if not names or missing:
        raise LakeError(
            f"the labels {labels} have no column {', '.join(missing) or 'request_id'} to join on; "
            f"they have: {', '.join(labels.schema.names)}; name the join columns with key="
        )
    return names


def _by_age(labels: Snapshot) -> pa.Table:
    """The labels, those written first coming first."""
    files = sorted(labels.files(), key=lambda f: (f.modified_ms, f.path))
    return pa.concat_tables([labels.read_file(f).drop_columns(POSITION) for f in files])


def _newest(labels: pa.Table, on: list[str]) -> pa.Table:
    """Keep the last label of each key."""
    numbered = labels.append_column("__at__", pa.array(range(len(labels)), pa.int64()))
    last = numbered.select([*on, "__at__"]).group_by(on).aggregate([("__at__", "max")])
    return labels.take(last["__at___max"])


def _inner(left: pa.Table, right: pa.Table, on: list[str]) -> pa.Table:
    """Inner join by row numbers, since Arrow joins do not carry list columns."""
    a = left.select(on).append_column("__left__", pa.array(range(len(left)), pa.int64()))
    b = right.select(on).append_column("__right__", pa.array(range(len(right)), pa.int64()))
    same = pa.schema([*(a.field(c) for c in on), b.field("__right__")])
    pairs = a.join(b.cast(same), keys=on, join_type="inner")
    pairs = pairs.take(pc.sort_indices(pairs["__left__"]))
    joined = left.take(pairs["__left__"])
    for name in right.column_names:
        if name not in on:
            joined = joined.append_column(right.field(name), right[name].take(pairs["__right__"]))
    return joined
