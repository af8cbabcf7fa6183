"""How fast the stream is, beside its peers: ``python -m benchmarks.stream [--quick]``.

Every run is a process of its own; rounds are interleaved and begin at another peer each time;
figures are medians over rounds. The files a peer reads are in the file cache before each run.
Rates are rows per second from the first request of a batch to the last batch, as a ratio to the
pyarrow scan of the same round. A peer whose rows or sums are not the table's is an error.

Results: ``benchmarks/results/stream.json`` (the claims), ``stream_runs.json`` (all that was
measured) and ``stream.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.claims import HERE, RESULTS, Claim, record, write
from benchmarks.stream_claims import claims_of
from benchmarks.stream_peers import PEERS
from benchmarks.stream_tables import FULL, QUICK, Place, make, rewrite

AT = (0.01, 0.5, 0.99)
Runs = dict[str, list[dict[str, Any]]]


def main() -> None:
    """Run the benchmark and write what it found."""
    ask = _arguments()
    pythons = dict(pair.split("=", 1) for pair in ask.python_for)
    chosen = [p for p in PEERS if p in ask.peers.split(",")] if ask.peers else list(PEERS)
    found: dict[str, Any] = {"tables": {}, "resume": {}}
    for table in ask.tables.split(","):
        names = [p for p in chosen if table not in PEERS[p].without]
        shares = {1} if ask.quick else {1, *(PEERS[p].share for p in names)}
        size = QUICK if ask.quick else FULL
        root = make(table, ask.data, size, ask.quick, tuple(sorted(shares)))
        runs = _rounds(root, names, ask.rounds, pythons, whole=ask.quick)
        found["tables"][table] = summary(runs, Place(root).facts())
        if "lepton" in chosen:
            found["resume"][table] = resumes(root, ask.rounds)
    if ask.full:
        for files in (10, 10_000):
            root = rewrite(ask.data / ("numeric-quick" if ask.quick else "numeric"), files)
            found["resume"][f"numeric in {files:,} files"] = resumes(root, ask.rounds)
    finish(claims_of(found, ask.rounds, quick=ask.quick), found)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("/tmp/lepton-bench"))
    parser.add_argument("--quick", action="store_true", help="100 MB a table instead of 1.5 GB")
    parser.add_argument("--full", action="store_true", help="also resume at 10 and 10,000 files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tables", default="numeric,images", help="of numeric,images,vectors")
    parser.add_argument("--peers", default="", help=f"of {','.join(PEERS)}")
    parser.add_argument(
        "--python-for",
        action="append",
        default=[],
        metavar="PEER=PATH",
        help="run a peer by another environment's python, if its packages clash",
    )
    return parser.parse_args()


def _rounds(
    root: Path, names: list[str], rounds: int, pythons: dict[str, str], *, whole: bool
) -> Runs:
    runs: Runs = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if runs[name] and "seconds" not in runs[name][-1]:
                continue
            share = 1 if whole else PEERS[name].share
            run = _one(name, Place(root, share), pythons.get(name, sys.executable))
            runs[name].append(run)
            print(f"{root.name} round {turn + 1} {name}: {_line(run)}", flush=True)
    return runs


def _one(name: str, place: Place, python: str) -> dict[str, Any]:
    """Run one peer once, and check what it delivered."""
    kind, converted = PEERS[name].copy, 0.0
    if kind != "delta":
        ask = {"what": "convert", "kind": kind, "root": str(place.root), "share": place.share}
        made = _process(python, ask)
        if "seconds" not in made:
            return made
        converted = made["seconds"]
    warm(place.copy(kind))
    ask = {"what": "measure", "name": name, "root": str(place.root), "share": place.share}
    run = _process(python, ask)
    if "passes" not in run:
        return run
    facts = place.facts()
    for one in run["passes"]:
        _prove(name, one, facts)
    last = run["passes"][-1]
    return {
        "seconds": last["seconds"],
        "rate": last["rows"] / last["seconds"],
        "first_s": last["first_s"],
        "open_s": last["open_s"],
        "cold_rate": run["passes"][0]["rows"] / run["passes"][0]["seconds"],
        "peak_mb": run["peak_mb"],
        "imported_mb": run["imported_mb"],
        "children_mb": run["children_mb"],
        "rows": last["rows"],
        "convert_s": converted,
    }


def _process(python: str, ask: dict[str, Any]) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(HERE), "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [python, "-m", "benchmarks.stream_once", json.dumps(ask)],
        cwd=HERE,
        env=environment,
        capture_output=True,
        text=True,
    )
    lines = [x for x in done.stdout.splitlines() if x.startswith("{")]
    if "ModuleNotFoundError" in done.stderr:
        return {"missing": done.stderr.strip().rpartition("named ")[2]}
    if done.returncode or not lines:
        return {"failed": (done.stderr or done.stdout)[-2000:]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _prove(name: str, run: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raise unless the rows and the sums of like columns are the table's."""
    same = [c for c, kind in facts["kinds"].items() if run["kinds"].get(c) == kind]
    wrong = [c for c in same if run["sums"][c] != facts["sums"][c]]
    if run["rows"] != facts["rows"] or wrong or not same:
        raise SystemExit(
            f"{name} delivered {run['rows']} of {facts['rows']} rows; columns with another sum: "
            f"{wrong}; comparable columns: {same}"
        )


def warm(folder: Path) -> None:
    """Read every file once, so that all runs find them in the file cache."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            with file.open("rb") as bytes_:
                while bytes_.read(1 << 24):
                    pass


def summary(runs: Runs, facts: dict[str, Any]) -> dict[str, Any]:
    """Return medians by peer, and ratios to the scan of the same round."""
    limit = [r.get("rate") for r in runs.get("scan", [])]
    peers: dict[str, Any] = {}
    for name, found in runs.items():
        if not found or "seconds" not in found[-1]:
            peers[name] = found[-1] if found else {"missing": name}
            continue
        pairs = list(zip(found, limit, strict=False))
        peers[name] = {
            "shuffles": PEERS[name].shuffles,
            "copy": PEERS[name].copy,
            "ratio": _median(r["rate"] / top for r, top in pairs if top),
            "cold_ratio": _median(r["cold_rate"] / top for r, top in pairs if top),
            **{key: _median(r[key] for r in found) for key in found[0]},
            "runs": found,
        }
    row_bytes = facts["bytes"] / facts["rows"]
    return {
        "rows": facts["rows"],
        "mb": facts["bytes"] / 1e6,
        "row_bytes": row_bytes,
        "peers": peers,
    }


def resumes(root: Path, rounds: int) -> dict[str, Any]:
    """Time resuming at several places of the epoch."""
    found: dict[str, Any] = {}
    warm(root / "delta")
    for at in AT:
        ask = {"what": "resume", "root": str(root), "at": at}
        runs = [_process(sys.executable, ask) for _ in range(rounds)]
        bad = [r for r in runs if "seconds" not in r]
        found[f"{at:.0%}"] = bad[0] if bad else {k: _median(r[k] for r in runs) for k in runs[0]}
        print(f"{root.name} resume at {at:.0%}: {found[f'{at:.0%}']}", flush=True)
    return found


def _median(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def _line(run: dict[str, Any]) -> str:
    if "missing" in run:
        return f"not installed ({run['missing']})"
    if "failed" in run:
        return f"failed: {run['failed'].strip().splitlines()[-1]}"
    return f"{run['rate']:,.0f} rows/s, first batch {run['first_s']:.2f} s, {run['peak_mb']:.0f} MB"


def finish(claims: list[Claim], found: dict[str, Any]) -> None:
    """Print the claims; write them, with all that was measured, and the plot."""
    record(claims, "stream")
    write(found, "stream_runs.json")
    try:
        from benchmarks.stream_plot import plot
    except ModuleNotFoundError as e:
        print(f"no plot: {e.name} is not installed")
        return
    plot(found, RESULTS / "stream.png")


if __name__ == "__main__":
    main()
