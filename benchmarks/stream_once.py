"""One measurement in a process of its own: ``python -m benchmarks.stream_once '{...}'``.

The last line it prints is JSON. Times are in seconds; memory is the peak resident size in MB of
this process (of its mapped program alone, VmHWM) and of its largest child.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any


def peak_mb() -> float:
    """Return this process's peak resident size in MB."""
    status = Path("/proc/self/status")
    if not status.exists():
        scale = 2**20 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def read_bytes() -> int:
    """Return the bytes that this process has read so far, from the file cache or beyond."""
    found = Path("/proc/self/io")
    return int(found.read_text().split()[1]) if found.exists() else 0


def one_pass(name: str, root: str, share: int) -> dict[str, Any]:
    """Open, then time from the first request to the last batch."""
    from benchmarks.stream_batches import Consumer
    from benchmarks.stream_peers import PEERS
    from benchmarks.stream_tables import Place

    began = time.perf_counter()
    begin = PEERS[name].open(Place(Path(root), share))
    opened = time.perf_counter()
    consumer, first = Consumer(), 0.0
    for batch in begin():
        first = first or time.perf_counter()
        consumer.take(batch)
    ended = time.perf_counter()
    return {
        "open_s": opened - began,
        "first_s": first - opened,
        "seconds": ended - opened,
        "rows": consumer.rows,
        "batches": consumer.batches,
        "sums": consumer.sums,
        "kinds": consumer.kinds,
    }


def measure(name: str, root: str, share: int = 1) -> dict[str, Any]:
    """Run a peer's passes."""
    from benchmarks.stream_peers import PEERS

    peer = PEERS[name]
    if importlib.util.find_spec(peer.needs) is None:
        return {"missing": peer.needs}
    importlib.import_module(peer.needs)
    base = peak_mb()
    passes = [one_pass(name, root, share) for _ in range(peer.passes)]
    return {"passes": passes, "peak_mb": peak_mb(), "imported_mb": base}


def resume(root: str, at: float, engine: str = "worker") -> dict[str, Any]:
    """Time a shard from a cursor to its first batch, and count what is read for it."""
    import lepton
    from benchmarks.stream_batches import BATCH, checksum, tensor
    from benchmarks.stream_tables import Place

    uri = Place(Path(root)).uri
    warm = lepton.table(uri).stream(batch_size=BATCH, seed=1, engine=engine)  # pyright: ignore
    state = warm.shard(0, 1).state_dict()
    next(iter(warm.shard(0, 1)))  # imports and lazily loaded code are not part of a resume
    rows = warm.order(0).rows
    state["rows"] = int(rows * at) // BATCH * BATCH
    base = read_bytes()
    began = time.perf_counter()
    stream = lepton.table(uri).stream(batch_size=BATCH, seed=1, engine=engine)  # pyright: ignore
    shard = stream.shard(0, 1, state)
    built = time.perf_counter()
    batch = next(iter(shard))
    for values in batch.values():
        checksum(tensor(values))
    ended = time.perf_counter()
    return {
        "seconds": ended - began,
        "table_s": built - began,
        "read_mb": (read_bytes() - base) / 2**20,
        "rows": rows,
        "at": at,
        "peak_mb": peak_mb(),
    }


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    what = asked.pop("what")
    result = {"measure": measure, "resume": resume}[what](**asked)
    print(json.dumps(result), flush=True)
    os._exit(0) if "ray" not in sys.modules else sys.exit(0)
