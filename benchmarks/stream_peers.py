"""The peers: each opens a table and gives a function that begins one pass over its batches.

Opening (finding files, reading footers, starting Ray) is timed apart from the pass. Where a peer
offers several ways to torch batches, the fastest that we found stands here.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.stream_batches import BATCH, Batch, rebatch, tensor, tensors
from benchmarks.stream_tables import Place, shuffle_rows

Begin = Callable[[], Iterator[Batch]]
THREADS = 2


@dataclass(frozen=True)
class Peer:
    """One way to read a table.

    Attributes:
        open: from a place to the function that begins a pass.
        shuffles: "" in file order, "buffer" or "windows" near by, "all" over the whole table.
        needs: the module without which it is not installed.
        copy: which copy of the table it reads; "delta" is the table itself.
        passes: Ray's first pass in a process starts workers, so it is timed apart (cold, warm).
        share: reads the first 1/share of the files, because a whole pass would take too long.
        without: tables that it is not run on.
    """

    open: Callable[[Place], Begin]
    shuffles: str = ""
    needs: str = "pyarrow"
    copy: str = "delta"
    passes: int = 1
    share: int = 1
    without: tuple[str, ...] = ()


def scan(place: Place) -> Begin:
    """Row groups in file order, read by two threads: the limit that others are held against.

    A row group's columns become tensors once and are cut as tensors, which costs least.
    """
    groups = _row_groups(place)
    return lambda: _cut(map(tensors, _read_ahead(groups, lambda rows: rows)))


def _cut(groups: Iterable[Batch], size: int = BATCH) -> Iterator[Batch]:
    """Cut row groups into batches of ``size`` rows, across their ends; the last may be shorter."""
    rest: Batch = {}
    for group in groups:
        begin, rows = 0, len(next(iter(group.values())))
        if rest:
            begin = min(rows, size - len(next(iter(rest.values()))))
            rest = {n: torch.cat([rest[n], values[:begin]]) for n, values in group.items()}
            if len(next(iter(rest.values()))) < size:
                continue
            yield rest
        columns = {n: values[begin:].split(size) for n, values in group.items()}
        for parts in zip(*columns.values(), strict=True):
            rest = dict(zip(columns, parts, strict=True))
            if len(parts[0]) == size:
                yield rest
                rest = {}
    if rest:
        yield rest


def scan_taken(place: Place) -> Begin:
    """The scan with each row group's rows permuted: the price of any shuffle."""

    def permuted(rows: pa.Table) -> pa.Table:
        return rows.take(pa.array(np.random.default_rng(len(rows)).permutation(len(rows))))

    groups = _row_groups(place)
    return lambda: map(tensors, rebatch(_read_ahead(groups, permuted)))


def _row_groups(place: Place) -> list[tuple[str, int]]:
    return [(f, g) for f in place.files() for g in range(pq.read_metadata(f).num_row_groups)]


def _read_ahead(
    groups: list[tuple[str, int]], then: Callable[[pa.Table], pa.Table]
) -> Iterator[pa.Table]:
    def read(file: str, group: int) -> pa.Table:
        opened = pq.ParquetFile(file, memory_map=True, pre_buffer=False)  # the fastest way to read
        return then(opened.read_row_group(group, use_threads=False))

    with ThreadPoolExecutor(THREADS) as threads:
        waiting: deque[Any] = deque()
        for file, group in groups:
            waiting.append(threads.submit(read, file, group))
            if len(waiting) > THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class _Rows(torch.utils.data.IterableDataset[Batch]):
    """Each DataLoader worker reads every n-th file."""

    def __init__(self, files: list[str]) -> None:
        self.files = files

    def __iter__(self) -> Iterator[Batch]:
        here = torch.utils.data.get_worker_info()
        mine = self.files[here.id :: here.num_workers]
        groups = (pq.ParquetFile(f).iter_batches(BATCH, use_threads=False) for f in mine)
        for rows in itertools.chain.from_iterable(groups):
            yield tensors(pa.Table.from_batches([rows]))


def dataloader(place: Place) -> Begin:
    """A torch DataLoader over pyarrow with two workers."""
    files = place.files()
    loader = torch.utils.data.DataLoader(_Rows(files), batch_size=None, num_workers=THREADS)
    return lambda: iter(loader)


def _lepton(**options: Any) -> Callable[[Place], Begin]:
    def opened(place: Place) -> Begin:
        import lepton

        options.setdefault("engine", "worker")
        stream = lepton.table(place.uri).stream(batch_size=BATCH, seed=1, **options)

        def begin() -> Iterator[Batch]:
            for batch in stream.shard(0, 1):
                yield {name: tensor(values) for name, values in batch.items()}

        return begin

    return opened


def _lepton_ray(transform: Callable[[pa.Table], pa.Table] | None) -> Callable[[Place], Begin]:
    def opened(place: Place) -> Begin:
        import lepton

        _ray()
        stream = lepton.table(place.uri).stream(
            batch_size=BATCH, seed=1, engine="ray_data", transform=transform
        )
        shard = stream.as_ray_dataset().streaming_split(1)[0]

        def begin() -> Iterator[Batch]:
            for batch in shard:
                yield {name: tensor(values) for name, values in batch.items()}

        return begin

    return opened


def heavy(rows: pa.Table) -> pa.Table:
    """A transform that costs several times the reading: 20 sines a row."""
    first: Any = rows.column(0)
    x = first.to_numpy().astype(np.float64)
    for _ in range(20):
        x = np.sin(x)
    return rows.append_column("heavy", pa.array(x))


def _ray() -> Any:
    import logging

    import ray
    import ray.data  # noqa: TID251 - the peer itself

    if not ray.is_initialized():
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    context = ray.data.DataContext.get_current()  # noqa: TID251
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    return ray


def _ray_batches(ways: Any, place: Place, **options: Any) -> Iterator[Batch]:
    """Default collation for numbers; Arrow to torch by our own zero-copy views for images."""
    from ray.data.collate_fn import ArrowBatchCollateFn  # noqa: TID251

    class Images(ArrowBatchCollateFn):
        def __call__(self, batch: pa.Table) -> Batch:
            return tensors(batch)

    if not place.root.name.startswith("numeric"):
        options["collate_fn"] = Images()
    return iter(ways.iter_torch_batches(batch_size=BATCH, **options))


def _ray_read(
    *,
    split: bool = False,
    shuffle: bool = False,
    transform: Callable[[pa.Table], pa.Table] | None = None,
) -> Callable[[Place], Begin]:
    def opened(place: Place) -> Begin:
        ray = _ray()
        rows: Any = ray.data.read_delta(place.uri)
        if transform is not None:
            rows = rows.map_batches(
                transform, batch_size=None, batch_format="pyarrow", zero_copy_batch=True
            )
        if split:
            rows = rows.streaming_split(1)[0]
        options: dict[str, Any] = {}
        if shuffle:
            options = {"local_shuffle_buffer_size": shuffle_rows(place), "local_shuffle_seed": 1}
        return lambda: _ray_batches(rows, place, **options)

    return opened


def mosaic(place: Place) -> Begin:
    """MosaicML Streaming from its own format, shuffled by py1e, with its loader's two workers."""
    import streaming

    streaming.base.util.clean_stale_shared_memory()
    rows = streaming.StreamingDataset(
        local=str(place.copy("mds")),
        shuffle=True,
        shuffle_algo="py1e",
        shuffle_seed=1,
        shuffle_block_size=shuffle_rows(place),
        batch_size=BATCH,
    )
    loader = streaming.StreamingDataLoader(rows, batch_size=BATCH, num_workers=THREADS)
    return lambda: iter(loader)


def _hf(shuffles: str = "") -> Callable[[Place], Begin]:
    """Hugging Face's own copy: uncompressed Arrow, mapped into memory, nothing to decode."""

    def opened(place: Place) -> Begin:
        import datasets

        rows: Any = datasets.load_from_disk(str(place.copy("hf")))
        if shuffles == "all":
            rows = rows.shuffle(seed=1, keep_in_memory=True)
        if shuffles == "buffer":
            rows = rows.to_iterable_dataset().shuffle(seed=1, buffer_size=shuffle_rows(place))
        rows = rows.with_format("arrow")
        return lambda: map(tensors, rows.iter(batch_size=BATCH))

    return opened


def _hf_stream(*, shuffle: bool = False) -> Callable[[Place], Begin]:
    """Hugging Face streaming the table's own Parquet files as Arrow."""

    def opened(place: Place) -> Begin:
        import datasets

        rows: Any = datasets.load_dataset(
            "parquet", data_files=place.files(), split="train", streaming=True
        ).with_format("arrow")
        if shuffle:
            rows = rows.shuffle(seed=1, buffer_size=shuffle_rows(place))
        return lambda: map(tensors, rows.iter(batch_size=BATCH))

    return opened


def hf_torch(place: Place) -> Begin:
    """Hugging Face's own torch formatting; it makes float32 of doubles.

    Not for images: it strips the zeros that end a binary value, so rows come out too short.
    """
    import datasets

    rows: Any = datasets.load_from_disk(str(place.copy("hf"))).with_format("torch")

    return lambda: rows.iter(batch_size=BATCH)


def daft(place: Place) -> Begin:
    """Daft's Arrow iterator; its own torch datasets yield single rows, which is far slower.

    From the table's files: Daft 0.7's read_deltalake fails on deltalake 1.6's log.
    """
    import daft as d

    rows: Any = d.read_parquet(place.files())

    def tables() -> Iterator[pa.Table]:
        for part in rows.to_arrow_iter():
            yield pa.Table.from_batches([part]) if isinstance(part, pa.RecordBatch) else part

    return lambda: map(tensors, rebatch(tables()))


def lance(place: Place) -> Begin:
    """Lance's torch dataset from its own format."""
    from lance.torch.data import LanceDataset

    def to_tensors(rows: pa.RecordBatch, **_: Any) -> Batch:
        return tensors(pa.Table.from_batches([rows]))

    rows = LanceDataset(str(place.copy("lance")), batch_size=BATCH, to_tensor_fn=to_tensors)
    return lambda: iter(rows)


BYTES = ("images", "vectors")

PEERS: dict[str, Peer] = {
    "scan": Peer(scan),
    "scan_taken": Peer(scan_taken, shuffles="windows"),
    "lepton": Peer(_lepton(), shuffles="windows", needs="lepton"),
    "lepton_1_lane": Peer(_lepton(lanes=1), shuffles="windows", needs="lepton"),
    "lepton_in_order": Peer(_lepton(shuffle=False), needs="lepton"),
    "lepton_ray": Peer(_lepton_ray(None), shuffles="windows", needs="lepton", passes=2),
    "lepton_ray_heavy": Peer(
        _lepton_ray(heavy), shuffles="windows", needs="lepton", passes=2, share=4, without=BYTES
    ),
    "ray": Peer(_ray_read(), needs="ray", passes=2),
    "ray_split": Peer(_ray_read(split=True), needs="ray", passes=2),
    "ray_buffer": Peer(_ray_read(shuffle=True), shuffles="buffer", needs="ray", passes=2),
    "ray_heavy": Peer(_ray_read(transform=heavy), needs="ray", passes=2, share=4, without=BYTES),
    "dataloader": Peer(dataloader, needs="torch"),
    "hf_stream": Peer(_hf_stream(), needs="datasets"),
    "hf_stream_buffer": Peer(
        _hf_stream(shuffle=True), shuffles="buffer", needs="datasets", share=16
    ),
    "hf": Peer(_hf(), needs="datasets", copy="hf"),
    "hf_torch": Peer(hf_torch, needs="datasets", copy="hf", without=("images",)),
    "hf_shuffled": Peer(_hf("all"), shuffles="all", needs="datasets", copy="hf", share=16),
    "hf_buffer": Peer(_hf("buffer"), shuffles="buffer", needs="datasets", copy="hf"),
    "mosaic": Peer(mosaic, shuffles="windows", needs="streaming", copy="mds", share=16),
    "daft": Peer(daft, needs="daft"),
    "lance": Peer(lance, needs="lance", copy="lance"),
}
