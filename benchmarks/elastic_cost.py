"""What lepton adds to a step: against a bare torch loop, and with checkpoints of 200 MB.

Both run in one process on the same rows, interleaved, on one worker.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

from benchmarks import claims

BIG = 7168  # a square layer of this width has 206 MB
WINDOW, UNDISTURBED = 25, 8  # steps from one checkpoint to the next; those by which it is written


def measure(*, quick: bool) -> dict[str, Any]:
    """Return medians of seconds a step: bare and by lepton, without and with checkpoints."""
    import torch

    rounds, steps = (1, 60) if quick else (5, 200)
    bare: list[float] = []
    ours: list[float] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="lepton-cost-") as folder:
        table = _table(f"{folder}/t", 256 * steps)
        for k in range(rounds):
            bare.append(_bare(table, steps))
            ours.append(_lepton(table, steps, folder, f"r{k}"))
        kept = _checkpoints(folder, quick=quick)
    torch.set_num_threads(threads)
    return {"bare": bare, "lepton": ours, **kept}


def claims_of(cost: dict[str, Any]) -> list[claims.Claim]:
    """Return what they mean."""
    bare, ours = statistics.median(cost["bare"]), statistics.median(cost["lepton"])
    pairs = [b / a - 1 for a, b in zip(cost["bare"], cost["lepton"], strict=True)]
    runs = len(pairs)
    least = "what a step costs beyond a bare torch loop's on the same rows"
    return [
        claims.claim("bare torch step", bare * 1e3, None, "ms", runs=runs),
        claims.claim("lepton step", ours * 1e3, None, "ms", runs=runs),
        claims.claim(least, 100 * statistics.median(pairs), 3, "%", -1, runs=runs),
        claims.claim(
            "step time that one checkpoint of 206 MB in 100 steps costs",
            100 * statistics.median(cost["checkpoint_share"]),
            2,
            "%",
            -1,
            runs=len(cost["checkpoint_share"]),
        ),
        claims.claim(
            "how long a step waits for the copy of 206 MB",
            1e3 * statistics.median(cost["checkpoint_wait"]),
            None,
            "ms",
            runs=len(cost["checkpoint_wait"]),
        ),
    ]


def _table(uri: str, rows: int) -> Any:
    import numpy as np
    import pyarrow as pa

    import lepton

    x = np.random.default_rng(0).normal(size=(rows, 64)).astype("float32")
    kind = pa.list_(pa.float32(), 64)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 64).cast(kind)
    return lepton.write(pa.table({"x": flat, "y": x[:, :10].argmax(1).astype("int64")}), uri)


def _net() -> Any:
    import torch

    torch.manual_seed(0)
    wide = 640
    return torch.nn.Sequential(
        torch.nn.Linear(64, wide),
        torch.nn.ReLU(),
        torch.nn.Linear(wide, wide),
        torch.nn.ReLU(),
        torch.nn.Linear(wide, 10),
    )


def _bare(table: Any, steps: int) -> float:
    import torch
    from torch.nn import functional

    rows = table.to_arrow()
    x = torch.from_numpy(rows["x"].combine_chunks().flatten().to_numpy().copy()).reshape(-1, 64)
    y = torch.from_numpy(rows["y"].combine_chunks().to_numpy().copy())
    net = _net()
    opt = torch.optim.Adam(net.parameters())
    order = torch.randperm(len(x))
    times: list[float] = []
    for step in range(steps):
        began = time.perf_counter()
        mine = order[step * 256 : (step + 1) * 256]
        functional.cross_entropy(net(x[mine]), y[mine]).backward()
        opt.step()
        opt.zero_grad()
        times.append(time.perf_counter() - began)
    return statistics.median(times[10:])


def _lepton(table: Any, steps: int, folder: str, name: str) -> float:
    import torch
    from torch.nn import functional

    import lepton

    times: list[float] = []

    def loop(worker: Any) -> None:
        net = _net()
        worker.attach(net=net, opt=torch.optim.Adam(net.parameters()))
        began = time.perf_counter()
        for batch in worker.batches():
            worker.step(functional.cross_entropy(net(batch["x"]), batch["y"], reduction="sum"))
            now = time.perf_counter()
            times.append(now - began)
            began = now

    stream = table.stream(batch_size=256, lanes=1, engine="worker")
    lepton.train(loop, stream, name=name, home=folder, checkpoint_every=10**6, progress=False)
    assert len(times) == steps
    return statistics.median(times[10:])


def _checkpoints(folder: str, *, quick: bool) -> dict[str, list[float]]:
    """Train a net of 206 MB with a checkpoint every 25 steps, each against the steps around it.

    A checkpoint takes its time from the step that waits for the copy and from those beside which
    it is written. By the last steps before the next one it is done: what these take is the measure
    for the others. The first one is left out: it allocates the copy and exports the net.
    """
    import torch

    import lepton

    kept = 2 if quick else 6
    rows = _table(f"{folder}/big", 8 * WINDOW * (kept + 2))
    times: list[float] = []

    def loop(worker: Any) -> None:
        net = _wide()
        worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=1e-6))
        began = time.perf_counter()
        for batch in worker.batches():
            worker.step(net(batch["x"]).square().mean())
            now = time.perf_counter()
            times.append(now - began)
            began = now

    stream = rows.stream(batch_size=8, lanes=1, engine="worker")
    lepton.train(loop, stream, name="kept", home=folder, checkpoint_every=WINDOW, progress=False)
    windows = [times[at : at + WINDOW] for at in range(2 * WINDOW, len(times), WINDOW)]
    plain = [statistics.median(w[-UNDISTURBED:]) for w in windows]
    extra = [sum(w) - len(w) * p for w, p in zip(windows, plain, strict=True)]
    return {
        "checkpoint_share": [e / (100 * p) for e, p in zip(extra, plain, strict=True)],
        "checkpoint_wait": [w[0] - p for w, p in zip(windows, plain, strict=True)],
    }


def _wide() -> Any:
    """A net of 206 MB that takes a column as it comes, so that it is exported, too."""
    import torch

    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(BIG, BIG, bias=False)

        def forward(self, x: Any) -> Any:
            return self.layer(x.repeat(1, BIG // 64))

    return Wide()
