"""One measurement in a process of its own: ``python -m benchmarks.stream_once '{...}'``.

The last line it prints is JSON. Times are in seconds. Memory is the peak resident size in MB: of
this process (VmHWM, which counts mapped file pages too, but not what it was forked from), right
after imports and at the end, and of its largest ended child (DataLoader workers; not Ray's).
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


def disk_bytes() -> int | None:
    """Return the bytes that this process had fetched from the disk so far, mapped files' too."""
    found = Path("/proc/self/io")
    if not found.exists():
        return None
    line = next(x for x in found.read_text().splitlines() if x.startswith("read_bytes"))
    return int(line.split()[1])


def forget(folder: Path) -> None:
    """Take a folder's files out of the file cache, where the system lets us."""
    os.sync()  # pages not yet written cannot be dropped
    for path in folder.rglob("*.parquet"):
        with path.open("rb") as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


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


def rehearse() -> None:
    """Take one tiny batch, so that no peer pays for what pyarrow loads at first use (pandas)."""
    import pyarrow as pa

    from benchmarks.stream_batches import Consumer, tensors

    Consumer().take(tensors(pa.table({"a": [1.0], "b": [b"12345678"], "c": [[1, 2]]})))


def measure(name: str, root: str, share: int = 1) -> dict[str, Any]:
    """Run a peer's passes."""
    import pyarrow as pa
    import torch

    from benchmarks.stream_peers import PEERS, THREADS

    peer = PEERS[name]
    if importlib.util.find_spec(peer.needs) is None:
        return {"missing": peer.needs}
    importlib.import_module(peer.needs)
    torch.set_num_threads(1)  # else the consumer's sums wait for cores that readers hold
    pa.set_cpu_count(THREADS)
    rehearse()
    base = peak_mb()
    passes = [one_pass(name, root, share) for _ in range(peer.passes)]
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {"passes": passes, "peak_mb": peak_mb(), "imported_mb": base, "children_mb": child}


def convert(kind: str, root: str, share: int) -> dict[str, Any]:
    """Make a peer's copy of a table unless it is there."""
    from benchmarks import stream_tables

    return {"seconds": stream_tables.convert(kind, stream_tables.Place(Path(root), share))}


def resume(root: str, at: float, engine: str = "worker") -> dict[str, Any]:
    """Time a shard from a cursor to its first batch, with a warm file cache and with a cold one.

    What is read from the disk with a cold cache includes the system's own reading ahead.
    """
    import lepton
    from benchmarks.stream_batches import BATCH, checksum, tensor
    from benchmarks.stream_tables import Place

    uri = Place(Path(root)).uri

    def first_batch(state: dict[str, Any] | None) -> tuple[float, dict[str, Any], int]:
        began = time.perf_counter()
        stream: Any = lepton.table(uri).stream(batch_size=BATCH, seed=1, engine=engine)  # pyright: ignore
        shard = stream.shard(0, 1, state)
        begun: dict[str, Any] = shard.state_dict()
        for values in next(iter(shard)).values():
            checksum(tensor(values))
        return time.perf_counter() - began, begun, stream.order(0).rows

    _, state, rows = first_batch(None)  # imports and lazily loaded code are no part of a resume
    state["rows"] = int(rows * at) // BATCH * BATCH
    warm, _, _ = first_batch(state)
    peak = peak_mb()
    forget(Path(uri))
    before = disk_bytes()
    cold, _, _ = first_batch(state)
    after = disk_bytes()
    return {
        "seconds": warm,
        "cold_s": cold,
        "read_mb": None if before is None or after is None else (after - before) / 1e6,
        "rows": rows,
        "peak_mb": peak,
    }


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    what = asked.pop("what")
    result = {"measure": measure, "convert": convert, "resume": resume}[what](**asked)
    print(json.dumps(result), flush=True)
    os._exit(0) if "ray" not in sys.modules else sys.exit(0)
