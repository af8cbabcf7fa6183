"""One opening of a table, in a process of its own: a line of JSON with seconds and megabytes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Open the table of the first argument by the way of the second."""
    uri, way = sys.argv[1:3]
    import pyarrow as pa
    import pyarrow.dataset

    import lepton
    import lepton.lake.snapshot

    assert pa.dataset, lepton.lake.snapshot  # loaded before the clock starts
    before = _resident()
    started = time.perf_counter()
    kept: Any = WAYS[way](uri)
    opened = time.perf_counter() - started
    found = {"seconds": opened, "mb": _resident() - before, "peak_mb": _resident("VmHWM") - before}
    if way == "lepton":
        started = time.perf_counter()
        files = kept.where("x BETWEEN 5000 AND 5999 OR (p = 7 AND x < 9000)").files()
        found |= {"where_s": time.perf_counter() - started, "files": len(files)}
    print(json.dumps(found))


def _ours(uri: str) -> Any:
    import lepton

    return lepton.table(uri)


def _masks(uri: str) -> Any:
    import pyarrow as pa
    from deltalake import DeltaTable

    opened = DeltaTable(uri)
    return pa.RecordBatchReader.from_stream(opened.deletion_vectors()).read_all()


def _peer(uri: str) -> Any:
    from deltalake import DeltaTable

    return DeltaTable(uri).to_pyarrow_dataset()


WAYS = {"lepton": _ours, "deltalake": _peer, "masks": _masks}


def _resident(which: str = "VmRSS") -> float:
    """Return this process's memory in MB; ``ru_maxrss`` would count the parent's at the fork."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{which}:")[1].split()[0]) / 1e3


if __name__ == "__main__":
    main()
