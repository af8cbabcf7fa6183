"""A run that finds no room says what is missing, waits visibly, and ends when told to."""

import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from ray.util.placement_group import placement_group, placement_group_table
from torch.nn import functional

import lepton
from lepton.errors import TrainingError
from lepton.training.ray_trainer import abort
from tests.cluster.world import wait_until

pytestmark = pytest.mark.usefixtures("ray_cluster")


def loop(worker: Any) -> None:
    net = torch.nn.Linear(3, 3)
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
    for batch in worker.batches():
        worker.step(functional.cross_entropy(net(batch["x"]), batch["y"], reduction="sum"))


def stream_in(folder: Path) -> Any:
    x = np.random.default_rng(0).normal(size=(80, 3)).astype("float32")
    rows = pa.table({"x": list(x), "y": x.argmax(1).astype("int64")})
    return lepton.write(rows, folder / "t").stream(batch_size=20, lanes=4, engine="worker")


def test_without_enough_resources_it_is_said_which_and_waiting_ends(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"home": str(tmp_path), "progress": False, "workers": 2}
    rare = {"CPU": 0.5, "telescope": 1}
    with pytest.raises(TrainingError, match="start_timeout_s=6") as refused:
        lepton.train(
            loop, stream_in(tmp_path), name="r", resources=rare, start_timeout_s=6, **options
        )

    said = [line for line in capfd.readouterr().err.splitlines() if "waits for room" in line]
    assert len(said) == 1
    for text in (said[0], str(refused.value)):
        assert "2 workers need 0.5 CPU, 1 telescope each, there is room for 0" in text
        assert "telescope: 2 needed, 0 free of 0" in text
        assert "no node could hold even one" in text


def test_a_run_that_waits_begins_when_there_is_room(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    @ray.remote(num_cpus=ray.cluster_resources()["CPU"] - 1)
    class Greedy:
        def here(self) -> None:
            """Answer once it has its place."""

    greedy: Any = Greedy.remote()  # pyright: ignore
    ray.get(greedy.here.remote())
    said: list[str] = []

    def make_room() -> None:
        end = time.monotonic() + 300
        while not said and time.monotonic() < end:
            said.extend(x for x in capfd.readouterr().err.splitlines() if "waits for room" in x)
            time.sleep(0.1)
        ray.kill(greedy)

    freeing = threading.Thread(target=make_room)
    freeing.start()
    options: dict[str, Any] = {"home": str(tmp_path), "progress": False, "workers": 2}
    run = lepton.train(loop, stream_in(tmp_path), name="r", resources={"CPU": 1}, **options)
    freeing.join()

    assert run.steps == 4
    assert re.search(r"CPU: 2 needed, [01](\.\d+)? free of", said[0]), "others may run here, too"


def test_places_are_given_back_where_the_controller_is_killed() -> None:
    @ray.remote(num_cpus=0)
    class Controller:
        """One that cannot tidy up: as Ray Train's is while it waits for a node that is gone."""

        async def hold(self) -> list[str]:
            """Get a place, and ask for one that there is no room for; return both."""
            held = placement_group([{"CPU": 0.1}, {"CPU": 0.1}])
            asked = placement_group([{"telescope": 1}])
            await held.ready()
            return [held.id.hex(), asked.id.hex()]

        async def abort(self) -> None:
            """Hold everything up."""
            time.sleep(60)

        async def get_result(self) -> None:
            """Never asked for while it lives."""

    def states() -> list[str]:
        known = placement_group_table()
        return [known[place]["state"] for place in places]

    controller: Any = Controller.remote()  # pyright: ignore
    places: Any = ray.get(controller.hold.remote())
    assert states() == ["CREATED", "PENDING"]

    abort(controller)

    wait_until(lambda: states() == ["REMOVED", "REMOVED"])


def test_a_spare_leaves_a_cpu_to_those_who_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def free_cpus() -> float:
        return ray.available_resources().get("CPU", 0)

    wait_until(lambda: free_cpus() > 3)

    @ray.remote(num_cpus=free_cpus() - 3)
    class Greedy:
        def here(self) -> None:
            """Answer once it has its place."""

    greedy: Any = Greedy.remote()  # pyright: ignore
    ray.get(greedy.here.remote())
    try:
        stream = replace(stream_in(tmp_path), engine="ray_data")
        options: dict[str, Any] = {"home": str(tmp_path), "progress": False, "workers": 2}
        run = lepton.train(loop, stream, name="r", resources={"CPU": 1}, **options)
    finally:
        ray.kill(greedy)

    assert run.steps == 4  # with a spare in the third CPU's place, no row would ever come
    assert "waits for" not in capfd.readouterr().err
