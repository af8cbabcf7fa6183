"""A snapshot read by Ray Data holds the rows that one process reads, in the same order."""

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray.data

import lepton
from benchmarks.conformance_once import answer
from benchmarks.conformance_readers import READERS
from benchmarks.conformance_tables import cases


@pytest.mark.usefixtures("ray_cluster")
def test_a_dataset_holds_the_same_rows_in_order(tmp_path: Path) -> None:
    for start in range(0, 60, 20):
        snapshot = lepton.write(pa.table({"x": range(start, start + 20)}), tmp_path / "t")
    context = ray.data.DataContext.get_current()
    before, context.execution_options.preserve_order = (
        context.execution_options.preserve_order,
        True,
    )
    try:
        rows = [r["x"] for r in snapshot.to_dataset().iter_rows()]
        chosen = [r["x"] for r in snapshot.where("x >= 30").to_dataset().iter_rows()]
    finally:
        context.execution_options.preserve_order = before

    assert rows == snapshot.to_arrow()["x"].to_pylist()
    assert sorted(chosen) == list(range(30, 60))
    assert snapshot.to_dataset().count() == 60
    assert snapshot.where("x > 99").to_dataset().count() == 0


def test_read_tasks_group_small_files_cut_big_ones_and_carry_no_table(tmp_path: Path) -> None:
    from lepton.lake.log import DataFile
    from lepton.lake.ray_source import LARGEST, plan

    small = [(DataFile(f"{n:04}", 10), 1000) for n in range(3000)]
    tasks = plan([*small, (DataFile("big", 999), 7 * LARGEST)])
    pieces = [p for task in tasks for p in task]
    cut = [p for p in pieces if p.file.path == "big"]

    assert len(tasks) < 20
    assert [p.file for p in pieces[:3000]] == [f for f, _ in small]
    assert [(p.start, p.stop) for p in cut] == [(0, 333), (333, 666), (666, 999)]
    assert sum(p.rows or 0 for p in pieces) == 30999
    assert len(pickle.dumps(lepton.write(pa.table({"x": [1]}), tmp_path / "t"))) < 2000


def test_ray_is_told_a_size_of_the_right_order(tmp_path: Path) -> None:
    from lepton.lake.ray_source import _SnapshotSource

    numbers = np.random.default_rng(1).normal(size=50_000)
    kinds = pa.array([f"kind {n % 7}" for n in range(50_000)])
    snapshot = lepton.write(pa.table({"x": numbers, "kind": kinds}), tmp_path / "t")
    told = _SnapshotSource(snapshot).estimate_inmemory_data_size()

    assert told is not None
    assert 0.3 < told / snapshot.to_arrow().nbytes < 4
    assert _SnapshotSource(snapshot.where("x > 99")).estimate_inmemory_data_size() == 0


@pytest.mark.usefixtures("ray_cluster")
def test_every_conformance_case_is_right_or_refused_by_name_on_ray_too(tmp_path: Path) -> None:
    answers = {c.name: answer(READERS["lepton_ray"], c) for c in cases(tmp_path)}
    others = {name: a for name, a in answers.items() if a[0] != "right"}

    assert len(answers) > 90
    assert set(others) == {"variant_plain", "variant_shredded"}, others
    assert {outcome for outcome, _ in others.values()} == {"refused"}
