"""Handwritten digits: real data that comes with scikit-learn, and a small net for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lepton.lake import Snapshot, write
from lepton.preprocess import assign_split

if TYPE_CHECKING:
    import torch

    from lepton.training import Worker

CLASSES = 10


def digits() -> pa.Table:
    """Return the 1,797 digits: id, pixels (64 numbers from 0 to 16), label, split."""
    from sklearn.datasets import load_digits  # pyright: ignore[reportMissingTypeStubs]

    data: Any = load_digits()
    pixels: Any = pa.array(list(np.asarray(data.data, np.float32)), pa.list_(pa.float32()))
    columns: dict[str, Any] = {
        "id": np.arange(len(data.target)),
        "pixels": pixels,
        "label": np.asarray(data.target, np.int64),
    }
    rows = pa.table(columns)
    return assign_split(rows, key="id", train=0.8)


def write_digits(uri: str) -> Snapshot:
    """Write them in two commits, as data arrives in life; a table that is there is replaced."""
    rows = digits()
    half = len(rows) // 2
    write(rows.slice(0, half), uri, mode="overwrite", partition_by=["split"])
    return write(rows.slice(half), uri, mode="append")


def net() -> torch.nn.Module:
    """Return a small convolutional network: (rows, 64) pixels to (rows, 10) scores."""
    from torch import nn

    class Digits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(
                nn.Conv2d(1, 24, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(24, 48, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
            )
            self.scores = nn.Linear(48 * 4 * 4, CLASSES)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.scores(self.features(pixels.view(-1, 1, 8, 8)))

    return Digits()


def loop(worker: Worker) -> None:
    """Train the net with Adam: a training loop as a person would write it."""
    import torch
    from torch.nn import functional as nnf

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = net()
    opt = torch.optim.Adam(model.parameters(), lr=3e-3)
    worker.attach(net=model, opt=opt)
    for batch in worker.batches():
        scores = model(batch["pixels"])
        worker.step(nnf.cross_entropy(scores, batch["label"], reduction="sum"))
