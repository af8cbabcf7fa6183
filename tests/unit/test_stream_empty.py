"""Slices without rows are like the others: columns, types and the shape of a row."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

import lepton
from lepton.lake import Snapshot
from lepton.stream import mix
from lepton.stream.tensors import batch_of

KINDS = {
    "n": pa.int16(),
    "list": pa.list_(pa.float32()),
    "fixed": pa.list_(pa.int32(), 2),
    "text": pa.string(),
}


def table_of(folder: Path, rows: int) -> Snapshot:
    ids = np.arange(rows)
    columns = {
        "n": ids.astype(np.int16),
        "list": [[float(i)] * 3 for i in ids],
        "fixed": [[i, i] for i in ids],
        "text": [str(i) for i in ids],
    }
    return lepton.write(pa.table(columns, schema=pa.schema(KINDS)), folder / "t")


def stacked(rows: pa.Table) -> pa.Table:
    """What a transform is like that cannot do anything with no rows."""
    grid = np.stack([np.asarray(v, np.float32).reshape(3, 1) for v in rows["list"].to_pylist()])
    tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(grid))
    return rows.append_column("grid", tensor)


@pytest.mark.parametrize("rows", [9, 1], ids=["a short tail", "from the beginning"])
@pytest.mark.parametrize("transform", [None, stacked])
def test_a_rank_without_rows_has_the_shape_of_one_with_rows(
    tmp_path: Path, rows: int, transform: Any
) -> None:
    stream = table_of(tmp_path, rows).stream(batch_size=8, lanes=4, transform=transform)
    last: list[dict[str, Any]] = [list(stream.shard(r, 4))[-1] for r in range(4)]
    tables = [list(stream.shard(r, 4, format="arrow"))[-1] for r in range(4)]
    alone = list(stream.shard(0, 1))[-1]

    assert [len(b["n"]) for b in last] == [1, 0, 0, 0]
    for batch in last:
        assert list(batch) == list(alone)
        for name in [name for name in batch if name != "text"]:
            assert batch[name].shape[1:] == alone[name].shape[1:]
            assert batch[name].dtype == alone[name].dtype
        assert batch["list"].shape[1:] == (3,)
    assert len({str(t.schema) for t in tables}) == 1
    assert [len(t) for t in tables] == [1, 0, 0, 0]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    "keep", [lambda t: t.filter(pc.field("n") < 3), lambda t: t.filter(pc.field("n") > 2000)]
)
def test_batches_of_which_everything_is_dropped_have_the_shape_of_the_others(
    tmp_path: Path, world_size: int, keep: Callable[[pa.Table], pa.Table]
) -> None:
    called: list[int] = []

    def transform(rows: pa.Table) -> pa.Table:
        called.append(len(rows))
        return keep(rows)

    stream = table_of(tmp_path, 70).stream(batch_size=8, lanes=4, transform=transform)
    kept = len(keep(stream.snapshot.to_arrow()))
    found = [list(stream.shard(r, world_size)) for r in range(world_size)]

    assert sum(len(b["n"]) for batches in found for b in batches) == kept
    for batch in (b for batches in found for b in batches):
        assert batch["list"].shape[1:] == ((3,) if kept else (0,))
        assert batch["fixed"].shape[1:] == ((2,) if kept else (0,))
    assert 0 not in called


def test_a_mixture_asks_no_transform_to_work_on_no_rows(tmp_path: Path) -> None:
    rows = table_of(tmp_path, 30)
    mixture = mix(*(rows.stream(batch_size=b, lanes=2, transform=stacked) for b in (8, 4)))

    assert [len(b["grid"]) for b in mixture.shard(0, 1)] == [12, 12, 12, 9]


def test_no_rows_of_lists_of_a_fixed_length_keep_it() -> None:
    none: Any = pa.schema(KINDS).empty_table()

    assert batch_of(none)["fixed"].shape == (0, 2)
