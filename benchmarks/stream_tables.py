"""The benchmark's tables, made on the spot, and the copies that some peers need of them.

- ``numeric``: the eight numeric columns of TPC-H's lineitem, by ``tpchgen-cli``; decimals are cast
  to double, since no tensor holds decimals. 60 bytes a row.
- ``images``: a label and 3,072 bytes (32 x 32 x 3), noise. Delta has neither unsigned bytes nor
  lists of fixed length, so they are ``binary``, which every peer can view as uint8 (rows, 3072).
- ``vectors``: a label and a list of 768 float32: as many bytes, as Delta's own array type.

Each is a Delta table of several files with several row groups, written by deltalake with its own
defaults (Snappy). A table's ``facts.json`` holds the rows and the sums that a reader must deliver.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, Schema
from deltalake.transaction import AddAction, create_table_with_add_actions

NUMERIC = {
    "l_orderkey": pa.int64(),
    "l_partkey": pa.int64(),
    "l_suppkey": pa.int64(),
    "l_linenumber": pa.int32(),
    "l_quantity": pa.float64(),
    "l_extendedprice": pa.float64(),
    "l_discount": pa.float64(),
    "l_tax": pa.float64(),
}
IMAGE_BYTES = 3072
COPIES = ("mds", "hf", "lance")


@dataclass(frozen=True)
class Place:
    """Where a table and its copies lie.

    Attributes:
        root: the table's folder; below it ``delta`` and a folder for each copy.
        share: the table is the first 1/share of the files (slow peers read less, at a like rate).
    """

    root: Path
    share: int = 1

    @property
    def uri(self) -> str:
        """The Delta table."""
        return str(self.copy("delta"))

    def copy(self, kind: str) -> Path:
        """Return the folder of the table, or of a peer's copy of it."""
        return self.root / (kind if self.share == 1 else f"{kind}-{self.share}")

    def files(self) -> list[str]:
        """Return the data files in the order of their names."""
        return sorted(DeltaTable(self.uri).file_uris())

    def facts(self) -> dict[str, Any]:
        """Return rows, bytes and sums that a whole pass must deliver."""
        return json.loads((self.root / f"facts-{self.share}.json").read_text())


@dataclass(frozen=True)
class Size:
    """How much of everything.

    Attributes:
        scale: TPC-H scale factor; 6 million rows each.
        images: rows of 3 KB.
        files: data files a table.
    """

    scale: float
    images: int
    files: int


FULL = Size(scale=4, images=16 * 32_768, files=16)
QUICK = Size(scale=0.3, images=8 * 4_096, files=4)


def make(name: str, data: Path, size: Size, quick: bool, shares: tuple[int, ...]) -> Path:
    """Make a table unless it is there; return its folder."""
    root = data / f"{name}{'-quick' if quick else ''}"
    if not (root / "delta").exists():
        print(f"making {name} in {root}", flush=True)
        parts = {"numeric": _lineitem, "images": _images, "vectors": _vectors}[name]
        groups = 131_072 if name == "numeric" else 8_192 if not quick else 4_096
        shutil.rmtree(root, ignore_errors=True)
        _write(parts(root, size), root, groups)
    for share in shares:
        if not (root / f"facts-{share}.json").exists():
            _link(root, share)
            _state_facts(Place(root, share))
    return root


def _write(parts: Iterator[pa.Table], root: Path, group_rows: int) -> None:
    import deltalake

    being_made = root / "delta-in-making"
    properties = deltalake.WriterProperties(compression="SNAPPY", max_row_group_size=group_rows)
    for part in parts:
        deltalake.write_deltalake(
            being_made, part, mode="append", target_file_size=2**33, writer_properties=properties
        )
    being_made.rename(root / "delta")


def _lineitem(root: Path, size: Size) -> Iterator[pa.Table]:
    work = root / "tpch"
    tool = Path(sys.executable).with_name("tpchgen-cli")
    for part in range(1, size.files + 1):
        ask = ["parquet", "-s", str(size.scale), "--tables=lineitem", "--output-dir", str(work)]
        ask += [f"--parts={size.files}", f"--part={part}"]
        subprocess.run([str(tool), *ask], check=True, stdout=subprocess.DEVNULL)
        file = next(work.rglob("*.parquet"))
        rows = pq.read_table(file, columns=list(NUMERIC))
        file.unlink()
        yield rows.cast(pa.schema([pa.field(n, t) for n, t in NUMERIC.items()]))
    shutil.rmtree(work)


def _images(root: Path, size: Size) -> Iterator[pa.Table]:
    rows = size.images // size.files
    for part in range(size.files):
        noise = np.random.default_rng(part)
        pixels = pa.py_buffer(noise.bytes(rows * IMAGE_BYTES))
        ends = pa.py_buffer(np.arange(rows + 1, dtype=np.int32) * IMAGE_BYTES)
        image = pa.Array.from_buffers(pa.binary(), rows, [None, ends, pixels])
        yield pa.table({"label": noise.integers(0, 10, rows), "image": image})


def _vectors(root: Path, size: Size) -> Iterator[pa.Table]:
    rows, width = size.images // size.files, IMAGE_BYTES // 4
    for part in range(size.files):
        noise = np.random.default_rng(part)
        values = noise.random(rows * width, dtype=np.float32)
        ends = np.arange(rows + 1, dtype=np.int32) * width
        vector = pa.ListArray.from_arrays(pa.array(ends), pa.array(values))
        yield pa.table({"label": noise.integers(0, 10, rows), "vector": vector})


def _link(root: Path, share: int) -> None:
    """Make the table of the first 1/share of the files, by hard links."""
    if share == 1:
        return
    target = Place(root, share).copy("delta")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    files = Place(root).files()
    chosen = [Path(f) for f in files[: max(1, len(files) // share)]]
    for file in chosen:
        os.link(file, target / file.name)
    _commit(target, [target / f.name for f in chosen])


def _commit(target: Path, files: list[Path]) -> None:
    """Make a Delta table of Parquet files."""
    actions = [
        AddAction(
            file.name,
            file.stat().st_size,
            {},
            0,
            True,
            json.dumps({"numRecords": pq.read_metadata(file).num_rows}),
        )
        for file in files
    ]
    schema = Schema.from_arrow(pq.read_schema(files[0]))
    create_table_with_add_actions(str(target), schema, actions)


def _state_facts(place: Place) -> None:
    from benchmarks.stream_batches import BATCH, Consumer, tensors

    seen, size = Consumer(), 0
    for file in place.files():
        for group in pq.ParquetFile(file).iter_batches(batch_size=BATCH):
            table = pa.Table.from_batches([group])
            size += table.nbytes
            seen.take(tensors(table))
    facts = {"rows": seen.rows, "bytes": size, "sums": seen.sums, "kinds": seen.kinds}
    (place.root / f"facts-{place.share}.json").write_text(json.dumps(facts))


def convert(kind: str, place: Place) -> float:
    """Make a peer's own copy unless it is there; return how long it took, in seconds."""
    target = place.copy(kind)
    note = target.with_name(target.name + ".seconds")
    if not note.exists():
        print(f"converting {place.root.name} to {kind}", file=sys.stderr, flush=True)
        shutil.rmtree(target, ignore_errors=True)
        began = time.perf_counter()
        {"mds": _to_mds, "hf": _to_hf, "lance": _to_lance}[kind](place, target)
        note.write_text(str(time.perf_counter() - began))
    return float(note.read_text())


def _to_mds(place: Place, target: Path) -> None:
    from streaming import MDSWriter

    schema = pq.read_schema(place.files()[0])
    kinds = {"int64": "int64", "int32": "int32", "double": "float64"}
    columns = {f.name: kinds.get(str(f.type), f"ndarray:uint8:{IMAGE_BYTES}") for f in schema}
    if "vector" in columns:
        columns["vector"] = f"ndarray:float32:{IMAGE_BYTES // 4}"
    with MDSWriter(out=str(target), columns=columns, size_limit=1 << 26) as out:
        for file in place.files():
            for group in pq.ParquetFile(file).iter_batches(batch_size=8_192):
                for row in _rows(group):
                    out.write(row)


def _rows(group: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    from benchmarks.stream_batches import tensors

    columns = {n: t.numpy() for n, t in tensors(pa.Table.from_batches([group])).items()}
    for at in range(group.num_rows):
        yield {name: values[at] for name, values in columns.items()}


def _to_hf(place: Place, target: Path) -> None:
    import datasets

    work = str(target) + "-cache"
    rows = datasets.Dataset.from_parquet(place.files(), cache_dir=work)
    rows.save_to_disk(str(target))
    shutil.rmtree(work)


def _to_lance(place: Place, target: Path) -> None:
    import lance

    schema = pq.read_schema(place.files()[0])
    wide = {"image": pa.list_(pa.uint8(), IMAGE_BYTES), "vector": pa.list_(pa.float32(), 768)}
    schema = pa.schema([pa.field(f.name, wide.get(f.name, f.type)) for f in schema])
    lance.write_dataset(_fixed(place, schema), target, schema=schema, max_rows_per_group=8_192)


def _fixed(place: Place, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    from benchmarks.stream_batches import tensors

    for file in place.files():
        for group in pq.ParquetFile(file).iter_batches(batch_size=8_192):
            columns = tensors(pa.Table.from_batches([group]))
            arrays = []
            for name, kind in zip(schema.names, schema.types, strict=True):
                flat = pa.array(columns[name].numpy().reshape(-1))
                wide = pa.types.is_fixed_size_list(kind)
                arrays.append(
                    pa.FixedSizeListArray.from_arrays(flat, kind.list_size) if wide else flat
                )
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def shuffle_rows(place: Place) -> int:
    """Return how many rows a shuffle buffer or block may hold: 262,144, or 128 MB of them."""
    facts = place.facts()
    return min(262_144, 2**27 * facts["rows"] // facts["bytes"])


def rewrite(root: Path, files: int, rows: int = 2_400_000) -> Path:
    """Write the first rows of a table again as so many files; return the new table's folder."""
    target = root.with_name(f"{root.name}-{files}-files")
    if (target / "delta" / "_delta_log").exists():
        return target
    print(f"writing {root.name} as {files:,} files", flush=True)
    shutil.rmtree(target, ignore_errors=True)
    (target / "delta").mkdir(parents=True)
    whole = pa.concat_tables(pq.read_table(f) for f in Place(root).files()).slice(0, rows)
    each = -(-len(whole) // files)
    paths = [target / "delta" / f"part-{index:05d}.parquet" for index in range(files)]
    for index, path in enumerate(paths):
        pq.write_table(whole.slice(index * each, each), path)
    _commit(target / "delta", paths)
    return target
