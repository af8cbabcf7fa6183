"""The model that every server of the serving benchmark answers with: a small MLP for digits.

Trained by lepton; the peers load the same weights, so that all do the same arithmetic.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import lepton
from lepton.pipeline.digits import CLASSES, write_digits

MODEL = "digits"
PIXELS = 64


def loop(worker: Any) -> None:
    """Train the MLP for an epoch or so."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(PIXELS, 128), torch.nn.ReLU(), torch.nn.Linear(128, CLASSES)
    )
    worker.attach(net=net, opt=torch.optim.Adam(net.parameters(), lr=3e-3))
    for batch in worker.batches():
        scores = net(batch["pixels"])
        worker.step(torch.nn.functional.cross_entropy(scores, batch["label"], reduction="sum"))


class Heavy(torch.nn.Module):
    """As quick as a small net, but with random weights of so many megabytes to load."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        self.last = torch.nn.Linear(PIXELS, CLASSES)
        rows = megabytes * 2**20 // (4 * CLASSES)
        self.register_buffer("ballast", torch.rand(rows, CLASSES))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return scores, each row's with a little of one row of the ballast."""
        place = pixels.sum(1).abs().long() % self.ballast.shape[0]
        return self.last(pixels) + 1e-3 * self.ballast[place]


def heavy_loop(megabytes: int) -> Any:
    """Return a loop that trains for a step or two: what matters is what is saved."""

    def train(worker: Any) -> None:
        torch.set_num_threads(1)
        net = Heavy(megabytes)
        worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
        for batch in worker.batches():
            scores = net(batch["pixels"])
            worker.step(torch.nn.functional.cross_entropy(scores, batch["label"], reduction="sum"))

    return train


def make_heavy(folder: Path, versions: int, megabytes: int) -> list[lepton.ModelVersion]:
    """Train and register versions with so much to load, below ``folder``."""
    table = write_digits(str(folder / "lake" / MODEL))
    made: list[lepton.ModelVersion] = []
    for seed in range(versions):
        stream = table.stream(batch_size=1000, seed=seed)
        run = lepton.train(heavy_loop(megabytes), stream, name=f"heavy{seed}", home=str(folder))
        made.append(lepton.register(run, MODEL, metrics={}, home=str(folder)))
    return made


def make(folder: Path, versions: int = 1) -> list[lepton.ModelVersion]:
    """Train and register ``versions`` versions below ``folder``, with seeds of their own."""
    table = write_digits(str(folder / "lake" / MODEL))
    made: list[lepton.ModelVersion] = []
    for seed in range(versions):
        stream = table.stream(batch_size=64, epochs=2, seed=seed)
        run = lepton.train(loop, stream, name=f"{MODEL}{seed}", home=str(folder))
        made.append(lepton.register(run, MODEL, metrics={}, home=str(folder)))
        (folder / "program").write_text(str(Path(run.checkpoint.uri)))
    return made


def save_weights(folder: Path) -> None:
    """Leave the newest version's weights as plain torch for the peers, who need no lepton."""
    from lepton import checkpoints
    from lepton.export.restore import Predictor

    predictor = Predictor(checkpoints.load((folder / "program").read_text()))
    state = checkpoints.restore(predictor.manifest)[predictor.signature.net]
    torch.save(state, folder / "mlp.pt")


def bodies(folder: Path) -> dict[str, tuple[bytes, dict[str, str]]]:
    """Return the requests: by name, the body and its headers; real rows of the table."""
    from lepton.serving.protocol import raw_request_of, request_of

    rows = lepton.table(str(folder / "lake" / MODEL)).head(64)
    inputs = [{"name": "pixels", "datatype": "FP32", "shape": [-1, PIXELS]}]
    pixels = torch.tensor(rows.column("pixels").to_pylist()).numpy()
    raw, length = raw_request_of({"pixels": pixels})
    plain = {"Content-Type": "application/json"}
    return {
        "1 row, JSON": (request_of(rows.slice(0, 1), inputs), plain),
        "64 rows, JSON": (request_of(rows, inputs), plain),
        "64 rows, binary": (
            raw,
            {
                "Content-Type": "application/octet-stream",
                "Inference-Header-Content-Length": str(length),
            },
        ),
    }


def describe(folder: Path) -> None:
    """Write the requests where the load generator finds them."""
    told = {}
    for name, (body, headers) in bodies(folder).items():
        path = folder / f"{len(told)}.body"
        path.write_bytes(body)
        told[name] = {"body": str(path), "headers": headers}
    (folder / "requests.json").write_text(json.dumps(told))
