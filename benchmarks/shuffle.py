"""How well the stream shuffles, beside py1e of MosaicML Streaming and a uniform permutation.

``python -m benchmarks.shuffle``: reads one epoch's row identities and compares, over the rows
numbered as they lie in the table:

- *distance*: how far apart two rows end up that were neighbours in the table, as a share of the
  epoch (uniform: median 0.29);
- *left together*: the share of such pairs that end up within a batch's length;
- *blocks a batch*: how many different blocks of 4,096 neighbouring rows a batch draws on;
- *rows in memory*: rows of those blocks that are begun and not yet finished, at most. It is what
  any reader has to hold, and so the price of the shuffle; py1e is given the block size with which
  it needs as much as lepton.

Results: ``benchmarks/results/shuffle.json`` and ``shuffle.png``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.stream import RESULTS, commit, machine
from benchmarks.stream_tables import FULL, QUICK, Place, make

BATCH = 4096
BLOCK = 4096
SHARD_BYTES = 1 << 26
"""MosaicML's default size of a shard."""
SHARES = (1, 5, 25, 50, 75, 95, 99)
Order = np.ndarray[Any, np.dtype[np.int64]]


def lepton_order(uri: str, lanes: int | None = None) -> Order:
    """Return the rows of an epoch in lepton's order, as numbers in the table's."""
    import lepton

    shard = lepton.table(uri).stream(batch_size=BATCH, seed=1, lanes=lanes).shard(0, 1)
    parts: list[Order] = []
    while True:
        try:
            parts.append(shard.next_part().ids)
        except StopIteration:
            break
    ids = np.concatenate(parts)
    return np.searchsorted(np.sort(ids), ids)


def py1e_order(rows: int, shard_rows: int, block_rows: int) -> Order:
    """Return py1e's order over shards of so many rows."""
    from streaming.base.shuffle.py1e import get_shuffle_py1e

    sizes = np.full(-(-rows // shard_rows), shard_rows)
    sizes[-1] = rows - shard_rows * (len(sizes) - 1)
    return get_shuffle_py1e(sizes, 1, 1, 0, block_rows)


def held_rows(order: Order) -> int:
    """Return the most rows of blocks that are begun and not finished at any time."""
    at = np.empty(len(order), np.int64)
    at[order] = np.arange(len(order))
    starts = np.arange(0, len(order), BLOCK)
    first, last = np.minimum.reduceat(at, starts), np.maximum.reduceat(at, starts)
    rows = np.diff(np.append(starts, len(order)))
    change = np.zeros(len(order) + 1, np.int64)
    np.add.at(change, first, rows)
    np.add.at(change, last + 1, -rows)
    return int(np.cumsum(change).max())


def quality(order: Order) -> dict[str, Any]:
    """Return the figures of an order over rows 0 .. n-1."""
    at = np.empty(len(order), np.int64)
    at[order] = np.arange(len(order))
    apart = np.abs(np.diff(at))
    batches = [order[i : i + BATCH] // BLOCK for i in range(0, len(order) - BATCH + 1, BATCH)]
    return {
        "distance": {str(p): float(np.percentile(apart, p)) / len(order) for p in SHARES},
        "left_together": float((apart < BATCH).mean()),
        "blocks_a_batch": float(np.mean([len(np.unique(b)) for b in batches])),
        "rows_in_memory": held_rows(order),
    }


def py1e_at(held: int, rows: int, shard_rows: int) -> tuple[Order, int]:
    """Return py1e's order that needs about ``held`` rows in memory, and its block size.

    It cannot go below what its shards ask for; then that is what comes back.
    """
    low, high = 1, rows
    for _ in range(8):
        middle = (low + high) // 2
        if held_rows(py1e_order(rows, shard_rows, middle)) > held:
            high = middle
        else:
            low = middle
    return py1e_order(rows, shard_rows, low), low


def main() -> None:
    """Compare the orders and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("/tmp/lepton-bench"))
    parser.add_argument("--quick", action="store_true")
    ask = parser.parse_args()
    root = make("numeric", ask.data, QUICK if ask.quick else FULL, ask.quick, (1,))
    place, found = Place(root), {}
    facts = place.facts()
    rows = facts["rows"]
    orders = {
        "lepton": lepton_order(place.uri),
        "lepton, 1 lane": lepton_order(place.uri, lanes=1),
        "uniform": np.random.default_rng(1).permutation(rows),
    }
    shard_rows = min(rows // 4, SHARD_BYTES * rows // facts["bytes"])
    try:
        for name in ("lepton", "lepton, 1 lane"):
            order, block = py1e_at(held_rows(orders[name]), rows, shard_rows)
            orders[f"py1e, memory of {name} (block {block:,})"] = order
        orders["py1e, its defaults"] = py1e_order(rows, shard_rows, 1 << 18)
    except ImportError as e:
        print(f"py1e: not installed ({e})")
    for name, order in orders.items():
        found[name] = quality(order)
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    result = {"rows": rows, "commit": commit(), "machine": machine(), "orders": found}
    (RESULTS / "shuffle.json").write_text(json.dumps(result, indent=1) + "\n")
    _plot(orders, RESULTS / "shuffle.png")


def _plot(orders: dict[str, Order], target: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, order in orders.items():
        at = np.empty(len(order), np.int64)
        at[order] = np.arange(len(order))
        apart = np.sort(np.abs(np.diff(at)))[:: max(1, len(order) // 2000)] / len(order)
        panel.plot(apart, np.linspace(0, 1, len(apart)), label=name)
    panel.set_xscale("log")
    panel.set_xlabel("distance in the epoch of rows that were neighbours (1 = whole epoch)")
    panel.set_ylabel("share of pairs at most so far apart")
    panel.legend(frameon=False, fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
