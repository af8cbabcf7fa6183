"""Cross-validation by key hash, in this process. No Ray."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from torch.nn import functional

import lepton
from lepton import Validation
from lepton.errors import LakeError, TrainingError
from lepton.lake import Snapshot
from lepton.preprocess import Preparation
from lepton.stream import mix
from lepton.telemetry import spans_of
from lepton.training.folds import _parts


def make_loop(begun: list[str], fail_on: str = "") -> Callable[[Any], None]:
    def loop(worker: Any) -> None:
        begun.append(worker._plan.lineage["run"])
        if begun[-1] == fail_on:
            raise RuntimeError("the power went out")
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 3)
        worker.attach(net=net, opt=torch.optim.Adam(net.parameters(), lr=0.1))
        for batch in worker.batches():
            worker.step(functional.cross_entropy(net(batch["x"]), batch["y"], reduction="sum"))

    return loop


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    x = np.random.default_rng(0).normal(size=(240, 3)).astype("float32")
    who = [f"patient {i // 4}" for i in range(240)]
    rows = pa.table({"who": who, "x": list(x), "y": x.argmax(1).astype("int64")})
    return lepton.write(rows, tmp_path_factory.mktemp("lake") / "t")


def test_each_key_is_in_one_fold_and_stays_there(table: Snapshot, tmp_path: Path) -> None:
    parts = [set(p.to_pylist()) for p in _parts([table], "who", 4, "")]
    grown = lepton.write(
        pa.concat_tables(
            [
                table.to_arrow(),
                table.to_arrow().slice(0, 1).set_column(0, "who", pa.array(["somebody new"])),
            ]
        ),
        tmp_path / "grown",
    )
    later = [set(p.to_pylist()) for p in _parts([grown], "who", 4, "")]

    assert set().union(*parts) == {f"patient {i}" for i in range(60)}
    assert sum(len(p) for p in parts) == 60
    assert all(old <= new for old, new in zip(parts, later, strict=True))
    assert parts != [set(p.to_pylist()) for p in _parts([table], "who", 4, "salt")]


def test_every_row_is_judged_once_by_a_run_that_has_not_seen_its_key(
    table: Snapshot, tmp_path: Path
) -> None:
    seen: list[Snapshot] = []

    def fit(rows: Snapshot) -> Preparation:
        seen.append(rows)
        return Preparation()

    begun: list[str] = []
    options: dict[str, Any] = {
        "name": "cv",
        "key": "who",
        "folds": 3,
        "home": str(tmp_path),
        "validate": Validation(table, label="y", every=3),
        "fit": fit,
    }
    stream = table.stream(batch_size=40, epochs=2, lanes=1, columns=["x", "y"])
    with pytest.raises(RuntimeError, match="power"):
        lepton.cross_validate(make_loop(begun, "cv-fold-1"), stream, **options)
    found = lepton.cross_validate(make_loop(begun), stream, **options)

    assert begun == ["cv-fold-0", "cv-fold-1", "cv-fold-1", "cv-fold-2"]  # finished ones stay
    assert found.table["rows"].to_pylist() == [240 - s.count_rows() for s in seen[-3:]]
    assert sum(found.table["rows"].to_pylist()) == 240
    for rows, judged in zip(seen[-3:], found.judged, strict=True):
        trained = set(rows.select(["who"]).to_arrow()["who"].to_pylist())
        assert judged.rows == 4 * (60 - len(trained))
    figures = found.table["accuracy"].to_pylist()
    assert found.metrics["accuracy"] == pytest.approx(np.mean(figures))
    assert found.deviation["accuracy"] == pytest.approx(np.std(figures, ddof=1))
    assert str(found).endswith("over 3 folds")
    assert {run.trace_id for run in found.runs} == {found.trace_id}
    spans = [s for s in spans_of(f"{tmp_path}/traces") if s.name == "lepton.cross_validate"]
    assert [s.trace_id for s in spans] == [found.trace_id] * 2
    with pytest.raises(TrainingError, match="was begun with salt=''"):
        lepton.cross_validate(make_loop(begun), stream, salt="other", **options)


def test_what_cannot_be_cut_is_refused(table: Snapshot, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "name": "cv",
        "home": str(tmp_path),
        "validate": Validation(table, label="y"),
    }
    stream = table.stream(batch_size=40)
    few = table.where(pc.field("who") == "patient 1")
    for kind, message, rows, more in (
        (ValueError, "folds must be", stream, {"key": "who", "folds": 1}),
        (TypeError, "one table", mix(stream, stream), {"key": "who"}),
        (LakeError, "no column whom", stream, {"key": "whom"}),
        (ValueError, "only strings and integers", stream, {"key": "x"}),
        (
            ValueError,
            "have no key",
            few.stream(batch_size=2),
            {"key": "who", "validate": Validation(few, label="y")},
        ),
    ):
        with pytest.raises(kind, match=message):
            lepton.cross_validate(make_loop([]), rows, **{**options, **more})
    assert not list(tmp_path.iterdir())
