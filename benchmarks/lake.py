"""How fast tables are read and opened: ``python -m benchmarks.lake [--quick]``.

- Full read: ``to_dataset()`` and ``ray.data.read_delta``, both materialised on one local Ray, in
  turn; the ratio is the median over rounds of the ratio within a round. Files are in the file
  cache; both must deliver the same rows and the same sum.
- ``where``: the files that a selective filter reads, and their bytes. All others are moved away
  meanwhile, so that a file read needlessly is an error.
- Opening: a log of 100,000 files, in a process of its own each time.
- Deletion vectors: opening a table of 500 files of a million rows that each have one, against
  deltalake's masks of them all, which is how lepton opened such a table before.
- Writing a Ray Dataset: ``lepton.write`` and its ``write_delta``, to a new table each time.
- Merging by key, where every file has a row that changes: ``lepton.write`` and deltalake's merge.
- Page checksums: reading with and without verifying them, in turn; and flipped bits caught.

Results: ``benchmarks/results/lake.json`` (the claims) and ``lake_runs.json``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from deltalake import DeltaTable

import lepton
from benchmarks import lake_tables
from benchmarks.claims import HERE, Claim, claim, record, write
from benchmarks.lake_turns import in_turn, ratio, with_rounds
from lepton import Snapshot
from lepton.errors import LakeError
from lepton.lake.log import load_version
from lepton.lake.statistics import verdicts

FLIPS = 100
OPEN_FILES = 100_000
VECTORS = 500


def main() -> None:
    """Run the parts that are asked for and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("/tmp/lepton-bench/lake"))
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", default="read,where,open,vectors,write,merge,checksums")
    ask = parser.parse_args()
    parts = {"read": read, "where": where, "open": opening, "vectors": vectors}
    parts |= {"write": writing, "merge": merging, "checksums": checksums}
    claims: list[Claim] = []
    found: dict[str, Any] = {}
    for name in ask.parts.split(","):
        one, runs = parts[name](ask.data, 600_000 if ask.quick else 6_000_000, ask.rounds)
        claims += one
        found[name] = runs
    for one in claims:
        one["claim"] += " (quick)" if ask.quick else ""
    record(claims, "lake")
    write(found, "lake_runs.json")


def read(folder: Path, rows: int, rounds: int) -> tuple[list[Claim], Any]:
    """Compare distributed full reads."""
    import ray.data  # noqa: TID251 - the peer itself

    _ray()
    claims: list[Claim] = []
    runs: dict[str, Any] = {}
    shapes = {"12 files": (rows, 12), "400 small files": (rows // 4, 400)}
    for shape, (count, files) in shapes.items():
        uri = lake_tables.rows(folder, count, files)
        ways: dict[str, Callable[[], Any]] = {
            "lepton": lambda uri=uri: _fresh(uri).to_dataset(),
            "read_delta": lambda uri=uri: ray.data.read_delta(str(uri)),  # noqa: TID251
        }
        timed = {n: partial(_materialised, way, count) for n, way in ways.items()}
        for name, way in ways.items():
            if way().sum("id") != count * (count - 1) // 2:
                raise SystemExit(f"{name} delivers other rows than {uri} has")
        times = in_turn(timed, rounds)
        runs[shape] = times
        speed = ratio(times["read_delta"], times["lepton"])
        claims.append(claim(f"full read, {shape}: to_dataset to read_delta", speed, 1, "x"))
        for name in ways:
            rate = count / statistics.median(times[name]) / 1e6
            claims.append(claim(f"full read, {shape}: {name}", rate, None, "million rows/s"))
    return with_rounds(claims, rounds), runs


def _fresh(uri: Path) -> Snapshot:
    """Open a table as for the first time: nothing of its log is kept from before."""
    load_version.cache_clear()
    verdicts.cache_clear()
    return lepton.table(uri)


def _materialised(way: Callable[[], Any], count: int) -> None:
    data = way().materialize()
    if data.count() != count:
        raise SystemExit(f"{data.count()} rows, not {count}")


def _ray() -> None:
    import ray
    import ray.data  # noqa: TID251

    if not ray.is_initialized():
        cpus = len(os.sched_getaffinity(0))
        memory = {"object_store_memory": 2_000_000_000}
        ray.init(
            address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, **memory
        )
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        ray.data.DataContext.get_current().enable_progress_bars = False  # noqa: TID251


def where(folder: Path, rows: int, rounds: int) -> tuple[list[Claim], Any]:
    """Read by filters that few of many files can match, and few row groups of big files."""
    _ray()
    claims: list[Claim] = []
    runs: dict[str, Any] = {}
    for shape, count, files, can in (
        ("3 of 400 files", rows // 4, 400, 3),
        ("1 of 12 files", rows, 12, 1),
    ):
        uri = lake_tables.rows(folder, count, files)
        low = count // 2 + 10
        high = low + (can - 1) * (count // files)
        high = low + 1000 if can == 1 else high
        read, share = _chosen(uri, low, high)
        times = in_turn(_filtered(uri, low, high), rounds)
        runs[shape] = times
        speed = ratio(times["read_delta"], times["lepton"])
        claims += [
            claim(f"where, {shape}: files read", read, can, "files", -1),
            claim(f"where, {shape}: bytes of those files, of all", share, None, "%"),
            claim(f"where, {shape}: to_dataset to read_delta filtered", speed, 1, "x"),
        ]
    return with_rounds(claims, rounds), runs


def _chosen(uri: Path, low: int, high: int) -> tuple[int, float]:
    """Return how many files the filter reads and their share of all bytes; the rest is away."""
    chosen = {f.path for f in _between(uri, low, high).files()}
    every = {p.name: p.stat().st_size for p in uri.glob("*.parquet")}
    with tempfile.TemporaryDirectory(dir=uri.parent) as away:
        for name in set(every) - chosen:
            (uri / name).rename(Path(away) / name)
        try:
            snapshot = _between(uri, low, high)
            found = (
                len(snapshot.to_arrow()),
                snapshot.count_rows(),
                snapshot.to_dataset().materialize().count(),
            )
        finally:
            for name in set(every) - chosen:
                (Path(away) / name).rename(uri / name)
    if set(found) != {high - low}:
        raise SystemExit(f"the filter of {uri} gave {found} rows, not {high - low}")
    return len(chosen), 100 * sum(every[n] for n in chosen) / sum(every.values())


def _between(uri: Path, low: int, high: int) -> Snapshot:
    return _fresh(uri).where(f"id >= {low} AND id < {high}")


def _filtered(uri: Path, low: int, high: int) -> dict[str, Callable[[], None]]:
    import ray.data  # noqa: TID251
    from ray.data.expressions import col  # noqa: TID251

    def theirs() -> Any:
        data = ray.data.read_delta(str(uri))  # noqa: TID251
        return data.filter(expr=(col("id") >= low) & (col("id") < high))

    return {
        "lepton": lambda: _materialised(lambda: _between(uri, low, high).to_dataset(), high - low),
        "read_delta": lambda: _materialised(theirs, high - low),
    }


def opening(folder: Path, rows: int, rounds: int) -> tuple[list[Claim], Any]:
    """Open logs of many files; files that claim few rows and files that claim many."""
    del rows
    few = lake_tables.listed(folder, OPEN_FILES, 10)
    many = lake_tables.listed(folder, OPEN_FILES, 10_000_000)
    runs = {
        "lepton": [_open(few, "lepton") for _ in range(rounds)],
        "many rows": [_open(many, "lepton") for _ in range(rounds)],
        "deltalake": [_open(few, "deltalake")],
    }
    middle = {
        name: {key: statistics.median(r[key] for r in found) for key in found[0]}
        for name, found in runs.items()
    }
    ours, more = middle["lepton"], middle["many rows"]
    grown = more["peak_mb"] / ours["peak_mb"]
    what = f"open {OPEN_FILES:,} files"
    claims = [
        claim(what, ours["seconds"], 5, "s", -1),
        claim(f"{what}: memory kept", ours["mb"], None, "MB"),
        claim(f"{what}: peak memory", ours["peak_mb"], None, "MB"),
        claim(f"{what}: peak memory with a million times the rows", grown, 1.1, "x", -1),
        claim(f"{what}: a filter's files", ours["where_s"], None, "s"),
        claim(f"{what}: deltalake's to_pyarrow_dataset", middle["deltalake"]["seconds"], None, "s"),
    ]
    return with_rounds(claims, rounds), runs


def vectors(folder: Path, rows: int, rounds: int) -> tuple[list[Claim], Any]:
    """Open a table of which every file has a deletion vector, by descriptors and by all masks."""
    del rows
    uri = lake_tables.vectored(folder, VECTORS, 1_000_000)
    ways = ("lepton", "masks")
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for turn in range(rounds):
        for way in ways[:: 1 if turn % 2 else -1]:
            runs[way].append(_open(uri, way))
    found = {
        (way, key): [r[key] for r in runs[way]] for way in ways for key in ("seconds", "peak_mb")
    }
    quicker = ratio(found["masks", "seconds"], found["lepton", "seconds"])
    leaner = ratio(found["masks", "peak_mb"], found["lepton", "peak_mb"])
    what = f"open {VECTORS} files with deletion vectors"
    claims = [claim(f"{what}: all masks to descriptors, time", quicker, 1, "x")]
    claims.append(claim(f"{what}: all masks to descriptors, peak memory", leaner, 1, "x"))
    for way, key in found:
        unit = "s" if key == "seconds" else "MB"
        named = "peak memory, " if key == "peak_mb" else ""
        told = {"lepton": "lepton", "masks": "deltalake's masks"}[way]
        middle = statistics.median(found[way, key])
        claims.append(claim(f"{what}: {named}{told}", middle, None, unit))
    return with_rounds(claims, rounds), runs


def _open(uri: Path, way: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.lake_once", str(uri), way],
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def writing(folder: Path, rows: int, rounds: int) -> tuple[list[Claim], Any]:
    """Write a Dataset that is in memory, in few big blocks and in many small ones."""
    import ray.data  # noqa: TID251 - the peer itself

    _ray()
    source = lepton.table(lake_tables.rows(folder, rows // 4, 4)).to_arrow()
    claims: list[Claim] = []
    runs: dict[str, Any] = {}
    for shape, blocks in (("8 blocks", 8), ("200 small blocks", 200)):
        step = -(-len(source) // blocks)
        parts = [source.slice(n * step, step) for n in range(blocks)]
        data = ray.data.from_arrow(parts).materialize()  # noqa: TID251
        files: dict[str, int] = {}
        ways: dict[str, Callable[[Path], object]] = {
            "lepton": partial(lepton.write, data),
            "write_delta": lambda uri, data=data: data.write_delta(str(uri)),
        }
        timed = {n: partial(_written, way, len(source), files, n) for n, way in ways.items()}
        runs[shape] = times = in_turn(timed, rounds)
        speed = ratio(times["write_delta"], times["lepton"])
        claims.append(claim(f"write a Dataset, {shape}: write_delta to lepton", speed, 1, "x"))
        for name in ways:
            rate = len(source) / statistics.median(times[name]) / 1e6
            what = f"write a Dataset, {shape}: {name}"
            claims.append(claim(what, rate, None, "million rows/s"))
            claims.append(claim(f"{what}: files", files[name], None, "files"))
    return with_rounds(claims, rounds), runs


def _written(way: Callable[[Path], object], count: int, files: dict[str, int], name: str) -> None:
    with tempfile.TemporaryDirectory(prefix="lepton-write-") as place:
        uri = Path(place) / "t"
        way(uri)
        table = lepton.table(uri)
        files[name] = len(table.files())
        if table.count_rows() != count:
            raise SystemExit(f"{name} wrote {table.count_rows()} rows, not {count}")


def merging(folder: Path, rows: int, rounds: int) -> tuple[list[Claim], Any]:
    """Change one row of 20 in every file and add one of 100, in a copy of the table each time."""
    count = rows // 3
    uri = lake_tables.rows(folder, count, 16)
    old = lepton.table(uri).to_arrow().slice(0, count // 100)
    ids = np.concatenate([np.arange(0, count, 20), np.arange(count, count + len(old))])
    given = old.take(pa.array(ids % len(old))).set_column(0, "id", pa.array(ids))

    def theirs(copy: Path) -> None:
        merge = DeltaTable(copy).merge(given, "t.id = s.id", source_alias="s", target_alias="t")
        merge.when_matched_update_all().when_not_matched_insert_all().execute()

    ways: dict[str, Callable[[Path], object]] = {
        "lepton": lambda copy: lepton.write(given, copy, mode="merge", key="id"),
        "deltalake": theirs,
    }
    timed = {n: partial(_merged, way, uri, count + len(old)) for n, way in ways.items()}
    times = in_turn(timed, rounds)
    what = "merge that changes every file"
    claims = [
        claim(f"{what}: deltalake to lepton", ratio(times["deltalake"], times["lepton"]), 1, "x")
    ]
    for name in ways:
        claims.append(claim(f"{what}: {name}", statistics.median(times[name]), None, "s"))
    return with_rounds(claims, rounds), times


def _merged(way: Callable[[Path], object], uri: Path, count: int) -> None:
    with tempfile.TemporaryDirectory(dir=uri.parent) as place:
        copy = Path(place) / "t"
        shutil.copytree(uri, copy, copy_function=os.link)  # no file of a table is written again
        way(copy)
        if lepton.table(copy).count_rows() != count:
            raise SystemExit(f"a merge left {lepton.table(copy).count_rows()} rows, not {count}")


def checksums(folder: Path, rows: int, rounds: int) -> tuple[list[Claim], Any]:
    """Time verifying; flip bits, one at a time, and count how many are caught."""
    uri = lake_tables.rows(folder, rows // 4, 4, checksums=True)

    def whole(verify: str) -> None:
        os.environ["LEPTON_VERIFY_PAGES"] = verify
        assert len(lepton.table(uri).to_arrow()) == rows // 4

    times = in_turn({"on": lambda: whole("1"), "off": lambda: whole("0")}, rounds)
    caught = {verify: _caught(folder, verify) for verify in ("1", "0")}
    os.environ["LEPTON_VERIFY_PAGES"] = "1"
    claims = [
        claim(
            "page checksums: reading time, verified to not",
            ratio(times["on"], times["off"]),
            1.35,
            "x",
            -1,
        ),
        claim(f"page checksums: flipped bits caught of {FLIPS}", caught["1"], FLIPS, "bits"),
        claim(f"page checksums off: flipped bits caught of {FLIPS}", caught["0"], None, "bits"),
    ]
    return with_rounds(claims, rounds), {"seconds": times, "caught": caught}


def _caught(folder: Path, verify: str) -> int:
    """Count the flips after which reading raises."""
    os.environ["LEPTON_VERIFY_PAGES"] = verify
    uri = lake_tables.rows(folder, 20_000, 1, checksums=True)
    file = next(uri.glob("*.parquet"))
    chance, good = np.random.default_rng(7), file.read_bytes()
    original = uri.parent / "original.parquet"
    original.write_bytes(good)
    caught = 0
    try:
        for _ in range(FLIPS):
            lake_tables.flip(original, file, chance)
            try:
                lepton.table(uri).to_arrow()
            except LakeError:
                caught += 1
    finally:
        file.write_bytes(good)
        original.unlink()
    return caught


if __name__ == "__main__":
    main()
