"""Reading units: the rows a plan names, in the plan's order, each with its identity.

Both engines read with :func:`read_unit`; they differ in where it runs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from lepton import telemetry
from lepton.errors import LakeError, StreamError
from lepton.lake import Snapshot
from lepton.lake.read import POSITION
from lepton.stream.order import Ints, Order, Unit, row_ids
from lepton.telemetry import Carrier

ROW = "__row__"
"""Name of the int64 column that carries each row's identity from the file to the ledger."""

Transform = Callable[[pa.Table], pa.Table]

THREADS = 2


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is needed to read any unit: picklable, sent once to every reader."""

    snapshot: Snapshot
    transform: Transform | None
    carrier: Carrier | None = None

    def live(self, order: Order, chunk: int) -> pa.Table:
        """Return the live rows of a chunk in stored order, with their identities."""
        layout = order.layout
        file = self.snapshot.load().files[int(layout.file[chunk])]
        start, stop = int(layout.start[chunk]), int(layout.stop[chunk])
        rows = self.snapshot.read_file(file, start=start, stop=stop)
        if len(rows) != int(layout.live[chunk]):
            raise StreamError(
                f"{self.snapshot}: {file.path!r} has {len(rows)} live rows in [{start}, {stop}), "
                f"the plan counted {int(layout.live[chunk])}: was a file of the table replaced?"
            )
        ids = row_ids(int(layout.file[chunk]), rows[POSITION].to_numpy())
        return rows.drop_columns(POSITION).append_column(ROW, pa.array(ids))


def read_unit(source: Source, order: Order, unit: Unit) -> pa.Table:
    """Return the rows of a unit in order, not yet transformed; the last column is :data:`ROW`.

    Raises:
        StreamError: a file of the table cannot be read.
    """
    began = time.time_ns()
    try:
        chunks = [source.live(order, int(c)) for c in order.window_chunks(unit.window)]
    except LakeError as e:
        raise StreamError(f"the stream stops in epoch {unit.epoch}: {e}") from e
    wanted = order.window_rows(unit.window)[unit.low : unit.high]
    picked: Any = pa.array(wanted)
    rows = pa.concat_tables(chunks).take(picked)
    if source.carrier is not None:
        attributes = {
            "lepton.epoch": unit.epoch,
            "lepton.lane": unit.lane,
            "lepton.rows": unit.rows,
        }
        telemetry.record("lepton.read", source.carrier, began, attributes=attributes)
    return rows


def transformed(rows: pa.Table, transform: Transform | None) -> pa.Table:
    """Apply a transform to rows that carry identities; the identities do not pass through it.

    Raises:
        StreamError: the transform returned something else than a table with as many rows.
    """
    if transform is None:
        return rows
    result: Any = transform(rows.drop_columns(ROW))
    if not isinstance(result, pa.Table) or len(result) != len(rows):
        what = f"{len(result)} rows" if isinstance(result, pa.Table) else type(result).__name__
        raise StreamError(
            f"transform returned {what} for an Arrow table of {len(rows)} rows: it must return an "
            "Arrow table with the same rows in the same order (filter with where() instead)"
        )
    return result.append_column(ROW, rows[ROW])


def expected_rows(source: Source, order: Order, unit: Unit) -> Ints:
    """Return the identities a unit should deliver, from the plan and the log (not the data).

    Only a table with deletion vectors or a row filter has to be read for this.
    """
    chunks: list[int] = order.window_chunks(unit.window).tolist()
    layout = order.layout
    ids: list[Ints] = []
    for c in chunks:
        if layout.live[c] == layout.stop[c] - layout.start[c]:
            positions = np.arange(int(layout.start[c]), int(layout.stop[c]), dtype=np.int64)
            ids.append(row_ids(int(layout.file[c]), positions))
        else:
            ids.append(source.live(order, int(c))[ROW].to_numpy())
    return np.concatenate(ids)[order.window_rows(unit.window)[unit.low : unit.high]]


def read_here(
    source: Source, pieces: Iterable[tuple[Order, Unit]], *, ahead: int
) -> Iterator[tuple[Unit, pa.Table]]:
    """The ``worker`` engine: read units in this process, ``ahead`` of the consumer, in threads.

    At most ``ahead`` + 1 windows are in memory.
    """

    def read(order: Order, unit: Unit) -> pa.Table:
        return transformed(read_unit(source, order, unit), source.transform)

    waiting: deque[tuple[Unit, Future[pa.Table]]] = deque()
    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="lepton-read")
    try:
        for order, unit in pieces:
            waiting.append((unit, threads.submit(read, order, unit)))
            if len(waiting) > ahead:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:  # an abandoned iterator may be collected on any thread, so do not wait for these
        threads.shutdown(wait=False, cancel_futures=True)
