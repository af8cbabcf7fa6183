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
