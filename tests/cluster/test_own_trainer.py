"""The stream under Ray Data and Ray Train, with and without lepton's trainer."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from ray.train.v2._internal.execution.callback import ControllerCallback

import lepton
from lepton.errors import StreamError, TrainingError
from lepton.preprocess import Preparation
from lepton.stream import Digest, Stream
from lepton.training import load_run

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(autouse=True)
def ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain trainer's end waits for the dashboard, which is not here."""
    place = "ray.train.v2.api.data_parallel_trainer.PlacementGroupCleanerCallback"
    monkeypatch.setattr(place, ControllerCallback)


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Stream:
    uri = tmp_path_factory.mktemp("lake") / "t"
    for first in (0, 400):
        ids = np.arange(first, first + 401)
        lepton.write(pa.table({"id": ids, "x": ids * 0.5, "y": ids % 2}), uri)
    table = lepton.table(uri).where("id <> 7")
    prepare = Preparation.fit(table, standard=["x"])
    return table.stream(batch_size=64, seed=5, epochs=2, lanes=4, transform=prepare)


def consumed(shard: Any) -> list[Digest]:
    found = [Digest(), Digest()]
    while True:
        try:
            part = shard.next_part()
        except StopIteration:
            return found
        found[part.epoch] += part.digest


def test_both_engines_deliver_the_same_order(stream: Stream) -> None:
    expected = [stream.expected(0), stream.expected(1)]
    for engine in ("worker", "ray_data"):
        for transform in (stream.transform, None):
            chosen = replace(stream, engine=engine, transform=transform)
            assert consumed(chosen.shard(0, 1)) == expected, (engine, transform)

    assert expected[0].rows == 801


def test_the_dataset_has_the_rows_in_global_order(stream: Stream) -> None:
    one = replace(stream, engine="worker")
    wanted = [i for batch in one.shard(0, 1, format="arrow") for i in batch["id"].to_pylist()]
    batches = stream.as_ray_dataset().iter_batches(batch_format="pyarrow", batch_size=100)

    assert [i for batch in batches for i in batch["id"].to_pylist()] == wanted


def own_loop(config: dict[str, Any]) -> None:
    """A Ray Train loop that knows nothing of lepton but the shard it is given."""
    import ray.train

    shard = ray.train.get_dataset_shard("train")
    rank = ray.train.get_context().get_world_rank()
    if config["state"]:
        shard.load_state_dict(config["state"])
    assert len(shard) == config["steps"]
    found = [Digest(), Digest()]
    for _ in range(config["steps"]):
        part = shard.next_part()
        found[part.epoch] += part.digest
    record = {"state": shard.state_dict(), "found": [[d.high, d.low, d.rows] for d in found]}
    Path(config["out"], f"{rank}.json").write_text(json.dumps(record))


@pytest.mark.parametrize(("given", "engine"), [("stream", "worker"), ("dataset", "ray_data")])
def test_a_plain_trainer_gets_exact_shards(
    stream: Stream, tmp_path: Path, engine: Any, given: str
) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    chosen = replace(stream, engine=engine)
    half = stream.shard(0, 1)
    state = None
    skipped = Digest()
    if given == "dataset":  # resume in mid-epoch, at another world size
        for _ in range(5):
            skipped += half.next_part().digest
        state = half.state_dict()
    steps = stream.steps - (5 if state else 0)
    TorchTrainer(
        own_loop,
        train_loop_config={"out": str(tmp_path), "state": state, "steps": steps},
        datasets={"train": chosen if given == "stream" else chosen.as_ray_dataset()},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(tmp_path / "ray")),
    ).fit()
    ranks = [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(2)]
    totals = [Digest(), Digest()]
    for rank in ranks:
        for epoch in (0, 1):
            totals[epoch] += Digest(*rank["found"][epoch])

    assert totals[0] + skipped == stream.expected(0)
    assert totals[1] == stream.expected(1)
    assert ranks[0]["state"] == ranks[1]["state"]


def alone(stream: Stream) -> Any:
    return stream.shard(0, 1)


def coordinated(stream: Stream) -> Any:
    return stream.as_ray_dataset().streaming_split(2)[1]


@pytest.mark.parametrize("shard_of", [alone, coordinated])
def test_a_missing_file_stops_the_cluster_engine_by_name(
    tmp_path: Path, shard_of: Callable[[Stream], Any]
) -> None:
    rows = lepton.write(pa.table({"x": np.arange(90.0)}), tmp_path / "t")
    stream = rows.stream(batch_size=30, lanes=2, engine="ray_data")
    name = rows.files()[0].path
    (tmp_path / "t" / name).unlink()

    with pytest.raises(StreamError, match=rf"{name}' of table '{tmp_path / 't'}'@0") as error:
        next(shard_of(stream))
    assert "ray::" not in str(error.value)


def train_loop(fail_on: int | None) -> Callable[[Any], None]:
    def loop(worker: Any) -> None:
        import torch

        torch.manual_seed(0)
        net = torch.nn.Linear(1, 2)
        worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
        for batch in worker.batches():
            if worker.rank == fail_on:
                raise ZeroDivisionError("the person's own mistake")
            scores = net(batch["x"][:, None].float())
            worker.step(torch.nn.functional.cross_entropy(scores, batch["y"], reduction="sum"))

    return loop


def test_the_world_size_does_not_change_what_is_learnt(stream: Stream, tmp_path: Path) -> None:
    home = str(tmp_path)
    one = lepton.train(train_loop(None), stream, name="one", home=home)
    two = lepton.train(train_loop(None), stream, name="two", workers=(1, 2), home=home, audit=True)

    assert two.attempts[0][0].world_size == 2
    assert two.consumption(stream).exact
    assert len(one.losses) == stream.steps
    assert two.losses == pytest.approx(one.losses, rel=1e-4)


def test_a_persons_own_error_ends_the_run_at_once(stream: Stream, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="raised ZeroDivisionError on rank 1: the person's own"):
        lepton.train(train_loop(1), stream, name="r", workers=2, home=str(tmp_path))

    assert len(load_run("r", str(tmp_path)).attempts) == 1


def followed_loop(config: dict[str, Any]) -> None:
    """Epoch by epoch; rank 0 adds rows to the table while the first one is under way."""
    import ray.train

    shard = ray.train.get_dataset_shard("train")
    rank = ray.train.get_context().get_world_rank()
    if config["state"]:
        shard.load_state_dict(config["state"])
    seen: list[list[int]] = [[], []]
    first: Any = None
    while len(shard):
        part = shard.next_part()
        seen[part.epoch] += part.rows["id"].to_pylist()
        if first is None:
            first = shard.state_dict()
            if rank == 0:
                lepton.write(pa.table({"id": np.arange(config["from"], 90)}), config["uri"])
    record = {"seen": seen, "first": first, "last": shard.state_dict()}
    Path(config["out"], f"{rank}.json").write_text(json.dumps(record))


def test_a_trainer_follows_a_table_and_resumes_at_its_version(tmp_path: Path) -> None:
    """By engine auto: the state names the version of the epoch that is under way."""
    old = lepton.write(pa.table({"id": np.arange(70)}), tmp_path / "t")
    stream = old.stream(batch_size=10, lanes=4, epochs=2, follow=True)
    ranks = fitted(followed_loop, stream, tmp_path, 2, {"from": 70, "state": None})

    assert sorted(i for r in ranks for i in r["seen"][0]) == list(range(70))
    assert sorted(i for r in ranks for i in r["seen"][1]) == list(range(90))
    assert ranks[0]["first"] == ranks[1]["first"]
    assert ranks[0]["first"]["version"] == 0
    assert ranks[0]["last"]["version"] == 1

    newer = lepton.table(tmp_path / "t").stream(batch_size=10, lanes=4, epochs=2, follow=True)
    begun = stream.shard(0, 1, format="arrow")
    before = begun.next_part().rows["id"].to_pylist()
    options = {"from": 90, "state": begun.state_dict()}
    ranks = fitted(followed_loop, newer, tmp_path, 3, options)

    assert sorted(before + [i for r in ranks for i in r["seen"][0]]) == list(range(70))
    assert sorted(i for r in ranks for i in r["seen"][1]) == list(range(90))


def fitted(
    loop: Callable[[dict[str, Any]], None],
    stream: Any,
    folder: Path,
    workers: int,
    options: dict[str, Any],
) -> list[dict[str, Any]]:
    """What each rank of a TorchTrainer left behind."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    out = folder / f"{workers} workers"
    out.mkdir()
    TorchTrainer(
        loop,
        train_loop_config={"out": str(out), "uri": str(folder / "t"), **options},
        datasets={"train": stream},
        scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 0.1}),
        run_config=RunConfig(storage_path=str(folder / "ray")),
    ).fit()
    return [json.loads((out / f"{r}.json").read_text()) for r in range(workers)]


def cut_loop(config: dict[str, Any]) -> None:
    """Writes down what each step had, and fails after one of them, as a person's loop may."""
    import ray.train

    shard = ray.train.get_dataset_shard("train")
    rank = ray.train.get_context().get_world_rank()
    if config["state"]:
        shard.load_state_dict(config["state"])
    rows: list[list[int]] = []
    while len(shard):
        part = shard.next_part()
        rows += [[part.epoch, i] for i in part.rows["id"].to_pylist()]
        if config["cut"] is not None and len(shard) == config["cut"]:
            break
    record = {"state": shard.state_dict(), "rows": rows}
    Path(config["out"], f"{rank}.json").write_text(json.dumps(record))
    if len(shard):
        raise ZeroDivisionError("cut")


def test_a_trainer_cut_at_random_steps_goes_on_at_other_world_sizes(
    stream: Stream, tmp_path: Path
) -> None:
    from ray.train import WorkerGroupError

    engines: Any = {1: "ray_data", 2: "worker", 3: "ray_data"}
    left = sorted(random.Random(11).sample(range(1, stream.steps), 2), reverse=True)
    state: Any = None
    seen: Counter[tuple[int, int]] = Counter()
    for workers, cut in zip((1, 2, 3), [*left, None], strict=True):
        options = {"state": state, "cut": cut}
        with nullcontext() if cut is None else pytest.raises(WorkerGroupError, match="cut"):
            fitted(cut_loop, replace(stream, engine=engines[workers]), tmp_path, workers, options)
        out = tmp_path / f"{workers} workers"
        ranks = [json.loads((out / f"{r}.json").read_text()) for r in range(workers)]
        assert all(r["state"] == ranks[0]["state"] for r in ranks)
        state = ranks[0]["state"]
        seen.update((epoch, i) for r in ranks for epoch, i in r["rows"])

    ids = stream.snapshot.to_arrow()["id"].to_pylist()
    assert seen == Counter((epoch, i) for epoch in range(2) for i in ids)
