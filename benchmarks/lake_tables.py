"""The tables of the lake's benchmark, made on the spot and kept for the next run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable

from benchmarks import conformance_vectors
from benchmarks.conformance_log import Action, Log, column, metadata, protocol

SCHEMA = pa.schema(
    {
        "id": pa.int64(),
        "price": pa.float64(),
        "tax": pa.float64(),
        "count": pa.int32(),
        "kind": pa.string(),
        "note": pa.string(),
    }
)
_TYPES = {"int64": "long", "double": "double", "int32": "integer", "string": "string"}
GROUP = 250_000
_UNIQUE = "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9"


def rows(folder: Path, count: int, files: int, *, checksums: bool = False) -> Path:
    """Make a table of ``count`` rows, ascending by id, in files of like size; return its path."""
    name = f"rows-{count}-{files}{'-checked' if checksums else ''}"
    return _once(folder / name, lambda root: _write_rows(root, count, files, checksums=checksums))


def listed(folder: Path, files: int, rows_each: int, commits: int = 20) -> Path:
    """Make a log that lists many files, none of which is there, and a checkpoint of it."""

    def make(root: Path) -> None:
        log = Log(root)
        columns = metadata([column("p", "integer"), column("x", "long")], ["p"])
        each = files // commits
        for turn in range(commits):
            adds = [_listed(n, rows_each) for n in range(turn * each, (turn + 1) * each)]
            first = (protocol(reader=1, writer=2), columns) if turn == 0 else ()
            log.commit(*first, *adds)
            if turn == commits - 2:
                DeltaTable(root).create_checkpoint()

    return _once(folder / f"listed-{files}-{rows_each}", make)


def vectored(folder: Path, files: int, rows_each: int) -> Path:
    """Make a log in which every file has a deletion vector in a file of its own, 1% of its rows."""

    def make(root: Path) -> None:
        log = Log(root)
        chance = np.random.default_rng(5)
        gone = [
            np.unique(chance.integers(0, rows_each, rows_each // 100)).tolist()
            for _ in range(files)
        ]
        adds = [
            conformance_vectors.vectored(_listed(n, rows_each), one, root)
            for n, one in enumerate(gone)
        ]
        columns = [column("p", "integer"), column("x", "long")]
        log.commit(protocol(["deletionVectors"]), metadata(columns, ["p"]), *adds)

    return _once(folder / f"vectored-{files}-{rows_each}", make)


def _once(root: Path, make: object) -> Path:
    done = root / "_done"
    if not done.exists():
        shutil.rmtree(root, ignore_errors=True)
        assert callable(make)
        make(root)
        done.touch()
    return root


def _listed(number: int, rows_each: int) -> Action:
    low = number * 1000
    stats = {
        "numRecords": rows_each,
        "minValues": {"x": low},
        "maxValues": {"x": low + 999},
        "nullCount": {"x": 0},
    }
    part = str(number % 100)
    add = {
        "path": f"p={part}/part-{number:08}-{_UNIQUE}-c000.snappy.parquet",
        "partitionValues": {"p": part},
        "size": 1_000_000,
        "modificationTime": 1_700_000_000_000,
        "dataChange": True,
        "stats": json.dumps(stats),
    }
    return {"add": add}


def _write_rows(root: Path, count: int, files: int, *, checksums: bool) -> None:
    log = Log(root)
    each, adds = count // files, []
    for number in range(files):
        data = _generate(number * each, each, np.random.default_rng(number))
        ids = data["id"]
        stats = {
            "minValues": {"id": ids[0].as_py()},
            "maxValues": {"id": ids[-1].as_py()},
            "nullCount": {"id": 0},
        }
        options = {"row_group_size": GROUP, "write_page_checksum": checksums}
        adds.append(log.add(f"part-{number:05}.parquet", data, stats=stats, **options))
    columns = [column(f.name, _TYPES[str(f.type)]) for f in SCHEMA]
    log.commit(protocol(reader=1, writer=2), metadata(columns), *adds)


def _generate(first: int, count: int, chance: np.random.Generator) -> pa.Table:
    kinds = np.array(["small", "middling", "large", "other"])
    columns = [
        np.arange(first, first + count),
        chance.normal(100, 30, count).round(2),
        chance.random(count),
        chance.integers(0, 50, count, np.int32),
        kinds[chance.integers(0, 4, count)],
        np.char.add("note ", chance.integers(0, 10**6, count).astype(str)),
    ]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], SCHEMA)


def flip(source: Path, to: Path, chance: np.random.Generator) -> None:
    """Copy a table's first file with one bit of its data pages flipped."""
    footer = pq.read_metadata(source)
    end = source.stat().st_size - footer.serialized_size - 8
    data = bytearray(source.read_bytes())
    at = int(chance.integers(4, end))
    data[at] ^= 1 << int(chance.integers(8))
    to.write_bytes(bytes(data))
