"""A Ray Dataset is written where its rows are, in one commit, once."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import ray.data
from deltalake import DeltaTable

import lepton
from lepton.errors import LakeError
from lepton.lake.read import unchecked_files

BY: dict[str, Any] = {"mode": "merge", "key": "id"}

pytestmark = pytest.mark.usefixtures("ray_cluster")


def numbered(count: int, blocks: int) -> ray.data.Dataset:
    return ray.data.range(count, override_num_blocks=blocks)


def parquet(path: Path) -> set[str]:
    return {
        str(p.relative_to(path)) for p in path.rglob("*.parquet") if "_delta_log" not in p.parts
    }


def ids(path: Path) -> list[int]:
    return sorted(lepton.table(path).to_arrow()["id"].to_pylist())


def test_blocks_are_written_together_with_statistics_and_once(tmp_path: Path) -> None:
    root = tmp_path / "t"
    for _ in range(2):
        table = lepton.write(numbered(1000, 20), root, txn=("job", 1))

    assert table.version == 0
    assert ids(root) == list(range(1000))
    assert len(parquet(root)) == len(table.files()) < 20
    assert table.where("id >= 1000").files() == ()
    assert sum(table.statistics()["rows"].to_pylist()) == 1000
    lepton.write(numbered(10, 2), root, mode="overwrite")
    assert ids(root) == list(range(10))


def test_partitions_types_and_new_columns(tmp_path: Path) -> None:
    root = tmp_path / "t"
    parts = [None, "a/b c%", "x"]

    def make(batch: dict[str, Any]) -> pa.Table:
        part = [parts[i % 3] for i in batch["id"]]
        return pa.table({"id": batch["id"], "p": part, "v": [np.ones(2) * i for i in batch["id"]]})

    data = numbered(30, 3).map_batches(make)
    lepton.write(data, root, partition_by=["p"])
    frame = pd.DataFrame({"id": [100], "p": ["x"], "v": [[1.0]], "new": ["n"]})
    table = lepton.write(ray.data.from_pandas(frame), root, evolve="add")
    rows = {r["id"]: r for r in table.to_arrow().to_pylist()}

    assert len(rows) == 31
    assert rows[4] == {"id": 4, "p": "a/b c%", "v": [4.0, 4.0], "new": None}
    assert rows[100] == {"id": 100, "p": "x", "v": [1.0], "new": "n"}


def test_a_tensor_column_is_written_as_from_one_process(tmp_path: Path) -> None:
    data = ray.data.from_numpy(np.arange(24.0).reshape(4, 2, 3))
    (here,) = data.iter_batches(batch_format="pyarrow", batch_size=None)
    spread = lepton.write(data, tmp_path / "spread").to_arrow()

    assert spread.equals(lepton.write(here, tmp_path / "here").to_arrow())
    assert spread["data"].to_pylist()[1] == [6.0, 7.0, 8.0, 9.0, 10.0, 11.0]


BAD: list[tuple[Any, str]] = [
    (lambda batch: {"di": batch["id"]}, "no column di"),
    (lambda batch: {"id": [str(i) for i in batch["id"]]}, "column id is int64"),
    (lambda batch: {"id": np.where(batch["id"] == 77, -1, batch["id"])}, "constraint positive"),
    (lambda batch: {"id": batch["no such"]}, "Dataset failed"),
]


@pytest.mark.parametrize(("spoil", "told"), BAD, ids=["name", "type", "constraint", "program"])
def test_bad_rows_leave_the_table_and_no_file(tmp_path: Path, spoil: Any, told: str) -> None:
    root = tmp_path / "t"
    lepton.write(pa.table({"id": [1]}), root)
    DeltaTable(root).alter.add_constraint({"positive": "id >= 0"})
    before = parquet(root)
    data = numbered(78, 6).map_batches(spoil, batch_size=13)
    with pytest.raises(LakeError, match=rf"(?s)t'@1; nothing was committed: .*{told}"):
        lepton.write(data, root, mode="overwrite")

    assert parquet(root) == before
    assert ids(root) == [1]


def test_a_write_task_that_dies_is_tried_again_and_counts_once(tmp_path: Path) -> None:
    root, died = tmp_path / "t", tmp_path / "died"

    def make(batch: dict[str, Any]) -> dict[str, Any]:
        if 40 in batch["id"] and not died.exists():
            died.touch()
            import os
            import signal

            os.kill(os.getpid(), signal.SIGKILL)
        return batch

    lepton.write(numbered(100, 5).map_batches(make), root)

    assert died.exists()
    assert ids(root) == list(range(100))


def test_a_dataset_without_rows_is_refused(tmp_path: Path) -> None:
    empty = numbered(5, 1).filter(lambda row: row["id"] > 9)
    lepton.write(pa.table({"id": [1]}), tmp_path / "t")
    for path in ("t", "new"):
        with pytest.raises(LakeError, match="has no rows"):
            lepton.write(empty, tmp_path / path, mode="overwrite")
    assert ids(tmp_path / "t") == [1]


def doubled(batch: dict[str, Any]) -> dict[str, Any]:
    return {"id": batch["id"], "x": batch["id"] * 2.0}


def test_a_dataset_is_merged_deleted_and_put_in_rows_place_where_it_is(tmp_path: Path) -> None:
    root = tmp_path / "t"
    lepton.write(
        numbered(60, 3).map_batches(doubled).map_batches(doubled), root, mode="merge", key="id"
    )
    lepton.write(pa.table({"id": range(60, 90), "x": [-1.0] * 30}), root)
    new = numbered(100, 6).map_batches(lambda b: {"id": b["id"] + 50, "x": b["id"] * 0.0})
    merged = lepton.write(new, root, **BY)

    assert merged.version == 2
    assert ids(root) == list(range(150))
    assert merged.where("x = 0").count_rows() == 101
    assert unchecked_files(merged.load()) == ()
    assert all(f.rows is not None for f in merged.files())

    lepton.write(
        numbered(120, 4).map_batches(lambda b: {"id": b["id"]}), root, mode="delete", key="id"
    )
    assert ids(root) == list(range(120, 150))

    put = numbered(20, 3).map_batches(lambda b: {"id": b["id"] + 1000, "x": b["id"] * 1.0})
    table = lepton.write(put, root, mode="replace_where", where="id >= 140")
    assert sorted(table.to_arrow()["id"].to_pylist()) == [*range(120, 140), *range(1000, 1020)]
    assert [c.operation for c in table.history()[:3]] == ["REPLACE", "DELETE", "MERGE"]


MERGES: list[tuple[Any, dict[str, Any], str]] = [
    (lambda b: {"id": b["id"] // 2, "x": b["id"] * 1.0}, BY, "more than once"),
    (lambda b: {"id": -b["id"], "x": b["id"] * 1.0}, BY, "constraint positive"),
    (doubled, {"mode": "replace_where", "where": "id > 3"}, "do not match where"),
    (lambda b: {"id": b["no such"]}, {"mode": "delete", "key": "id"}, "Dataset failed"),
]


@pytest.mark.parametrize(("make", "how", "told"), MERGES, ids=["twice", "rule", "where", "program"])
def test_a_dataset_that_does_not_fit_changes_nothing(
    tmp_path: Path, make: Any, how: dict[str, Any], told: str
) -> None:
    root = tmp_path / "t"
    lepton.write(pa.table({"id": [1], "x": [0.5]}), root)
    DeltaTable(root).alter.add_constraint({"positive": "id >= 0"})
    before = parquet(root)
    with pytest.raises(LakeError, match=rf"(?s)t'@1; nothing was committed: .*{told}"):
        lepton.write(numbered(12, 3).map_batches(make), root, **how)

    assert parquet(root) == before
    assert ids(root) == [1]


def test_a_merge_whose_task_dies_counts_once_and_leaves_no_file(tmp_path: Path) -> None:
    root, died = tmp_path / "t", tmp_path / "died"
    lepton.write(numbered(50, 2), root)

    def make(batch: dict[str, Any]) -> dict[str, Any]:
        if 40 in batch["id"] and not died.exists():
            died.touch()
            import os
            import signal

            os.kill(os.getpid(), signal.SIGKILL)
        return batch

    table = lepton.write(numbered(80, 4).map_batches(make), root, mode="merge", key="id")
    live = {f.path for v in range(table.version + 1) for f in lepton.table(root, version=v).files()}

    assert died.exists()
    assert ids(root) == list(range(80))
    assert parquet(root) == live
