"""Several streams mixed in a fixed ratio: every global batch takes its rows from each of them.

The ratio is exact: a batch has ``batch_size`` rows of each stream. The first stream decides how
long an epoch is, and where its last batch is short, the others give their share of that, to the
nearest row. The others begin again, in a new order, as often as they end, in the middle of a batch
too: each of their rows comes once before any comes again. Order, world size and resuming are those
of the streams.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa

from lepton.errors import LakeError, StreamError
from lepton.lake import Snapshot
from lepton.stream.assembly import Part
from lepton.stream.cursor import Cursor, cursor_of
from lepton.stream.order import Digest, Ints, Order
from lepton.stream.shard import Format, Shard, formed
from lepton.stream.stream import Engine, Stream
from lepton.stream.tensors import Batch
from lepton.telemetry import Carrier

if TYPE_CHECKING:
    import ray.data

T = TypeVar("T")

ENDLESS = 2**31
STREAM_BITS = 56
"""Identities of the rows of stream k of a mixture have k above so many bits."""


def mix(*streams: Stream) -> Mixture:
    """Mix streams: a global batch holds ``batch_size`` rows of each, those of the first first.

    ``mix(old.stream(batch_size=192), new.stream(batch_size=64))`` gives batches of 256 rows, three
    of four from ``old``, for the epochs of the first stream.

    Raises:
        ValueError: fewer than two streams.
        StreamError: their columns differ.
    """
    if len(streams) < 2:
        raise ValueError("mix(...) takes two streams or more")
    first = streams[0].schema.remove_metadata()
    for other in streams[1:]:
        found = other.schema.remove_metadata()
        if [(f.name, f.type) for f in found] != [(f.name, f.type) for f in first]:
            raise StreamError(
                f"{streams[0].snapshot} and {other.snapshot} cannot be mixed: their columns are "
                f"{_described(first)} and {_described(found)}; choose columns= or a transform= "
                "that make them equal"
            )
    endless = (replace(s, epochs=ENDLESS) for s in streams[1:])
    return Mixture(streams=(streams[0], *endless))


def _described(schema: pa.Schema) -> str:
    return ", ".join(f"{f.name} {f.type}" for f in schema)


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixture:
    """Streams that are read together. Made by :func:`mix`; trained on like a stream.

    Attributes:
        streams: the first decides the length.
    """

    streams: tuple[Stream, ...]

    @property
    def first(self) -> Stream:
        """The stream that decides the length."""
        return self.streams[0]

    @property
    def snapshot(self) -> Snapshot:
        """The first stream's rows."""
        return self.first.snapshot

    @property
    def batch_size(self) -> int:
        """Rows of a full global batch."""
        return sum(s.batch_size for s in self.streams)

    @property
    def epochs(self) -> int:
        """Passes over the first stream."""
        return self.first.epochs

    @property
    def seed(self) -> int:
        """The first stream's seed."""
        return self.first.seed

    @property
    def engine(self) -> Engine:
        """Who reads."""
        return self.first.engine

    @property
    def transform(self) -> Any:
        """The first stream's transform."""
        return self.first.transform

    @property
    def trace(self) -> Carrier | None:
        """The span under which reads are recorded."""
        return self.first.trace

    @property
    def steps(self) -> int:
        """Global batches over all epochs."""
        return self.first.steps

    @property
    def lane_count(self) -> int:
        """The most ranks that can share the mixture."""
        return min(s.lane_count for s in self.streams)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the order depends on."""
        return self.identity

    @property
    def follow(self) -> bool:
        """Whether any stream follows its table."""
        return any(s.follow for s in self.streams)

    @property
    def identity(self) -> str:
        """Hash of what a run keeps when it is resumed."""
        return hashlib.sha256(" ".join(s.identity for s in self.streams).encode()).hexdigest()[:16]

    def shares(self, rows: int) -> list[int]:
        """Return the rows that the streams after the first give to ``rows`` rows of it."""
        whole = self.first.batch_size
        return [(2 * rows * s.batch_size + whole) // (2 * whole) for s in self.streams[1:]]

    def order(self, epoch: int) -> Order:
        """Return the first stream's order of an epoch."""
        return self.first.order(epoch)

    def with_lanes(self, most_workers: int) -> Mixture:
        """Return this mixture with lanes for so many workers; see :meth:`Stream.with_lanes`."""
        return Mixture(streams=tuple(s.with_lanes(most_workers) for s in self.streams))

    def read_by(self, engine: Engine, trace: Carrier | None) -> Mixture:
        """Return this mixture with another reader."""
        return Mixture(streams=tuple(s.read_by(engine, trace) for s in self.streams))

    def pinned(self) -> Mixture:
        """Return this mixture with streams that do not follow their tables."""
        return Mixture(streams=tuple(s.pinned() for s in self.streams))

    def shard(
        self,
        rank: int,
        world_size: int,
        cursor: Mapping[str, Any] | str | None = None,
        *,
        format: Format = "torch",  # noqa: A002 - as a stream's shard
    ) -> MixedShard:
        """Return one rank's part; see :meth:`Stream.shard`.

        Raises:
            ValueError: rank or world size do not fit.
            StreamError: the cursor is of another order.
        """
        shards = [s.shard(rank, world_size, format=format) for s in self.streams]
        mixed = MixedShard(self, shards, format)
        if cursor is not None:
            mixed.load_state_dict(cursor)
        return mixed

    def shards(self, world_size: int) -> list[MixedShard]:
        """Return one shard a rank, fed by a coordinator per stream; see the ``ray_data`` engine."""
        hosted = self.hosted(world_size)
        return [hosted.shard(rank, world_size) for rank in range(world_size)]

    def states(self, state: Mapping[str, Any] | str | None) -> list[Any]:
        """Return each stream's own state; None for each at the beginning.

        Raises:
            StreamError: the state is not of this mixture.
        """
        if state is None:
            return [None] * len(self.streams)
        begun = cursor_of(state)
        if isinstance(state, str):
            state = json.loads(state)
        found: Any = state.get("streams") if isinstance(state, Mapping) else None
        if begun.order != self.fingerprint or len(found or ()) != len(self.streams):
            raise StreamError(
                "the cursor is of another mixture: resume with the same streams (table versions, "
                "filters, batch sizes, seeds and lanes) in the same order, or start a new run"
            )
        return list(found)

    def hosted(self, most: int) -> HostedMixture:
        """Return this mixture with a coordinator per stream; see :class:`Hosted`."""
        return HostedMixture(self, most)

    def state_at(self, epoch: int, step: int) -> dict[str, Any]:
        """Return the state of every shard before a step, of streams that do not follow."""
        whole = self.first.batch_size
        full, tail = divmod(self.first.order(0).rows, whole)
        states = [self.first.state_at(epoch, step)]
        per_epoch = zip(self.streams[1:], self.shares(tail), strict=True)
        for stream, last in per_epoch:
            rows = stream.order(0).rows
            done = epoch * (full * stream.batch_size + last) + step * stream.batch_size
            states.append(Cursor(*divmod(done, rows), stream.fingerprint).to_dict())
        return self.state_of(states)

    def state_of(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the mixture's state, from its streams'."""
        return {**states[0], "order": self.fingerprint, "version": None, "streams": states}

    def as_ray_dataset(self) -> ray.data.Dataset:
        """Return the epochs as one Ray Dataset, global batch after global batch.

        Given to a Ray Train trainer (``datasets={"train": mixture.as_ray_dataset()}``),
        ``ray.train.get_dataset_shard("train")`` is this mixture's :class:`MixedShard`.
        """
        from lepton.stream.ray_dataset import dataset_of

        return dataset_of(self)

    def __call__(self) -> ray.data.Dataset:
        """Ray Train takes a function that makes a dataset: ``datasets={"train": mixture}``."""
        return self.as_ray_dataset()


class HostedMixture:
    """A mixture with its streams' coordinators; see :class:`lepton.stream.ray_engine.Hosted`."""

    def __init__(self, mixture: Mixture, most: int) -> None:
        from lepton.stream.ray_engine import Hosted

        self._mixture = mixture
        self._hosted = [Hosted(s, most) for s in mixture.streams]

    def shard(
        self,
        rank: int,
        world_size: int,
        cursor: Mapping[str, Any] | None = None,
        *,
        generation: int = 0,
    ) -> MixedShard:
        """Return a rank's shard; see :meth:`lepton.stream.ray_engine.Hosted.shard`.

        Raises:
            StreamError: the cursor is of another mixture.
        """
        states = self._mixture.states(cursor)
        shards = [
            h.shard(rank, world_size, state, generation=generation)
            for h, state in zip(self._hosted, states, strict=True)
        ]
        return MixedShard(self._mixture, shards, "torch")


class MixedPart:
    """One rank's slice of a global batch of a mixture; see :class:`lepton.stream.Part`."""

    def __init__(self, first: Part, others: list[list[Part]]) -> None:
        """Join the first stream's slice and the others', of which each may have several."""
        numbered = enumerate(others, 1)
        self._numbers = [0, *(k for k, parts in numbered for _ in parts)]
        self._parts = [first, *(part for parts in others for part in parts)]
        self.epoch = first.epoch
        self.step = first.step
        self.global_rows = sum(p.global_rows for p in self._parts)

    @property
    def delivered(self) -> int:
        """Rows in the slice."""
        return sum(p.delivered for p in self._parts)

    @cached_property
    def ids(self) -> Ints:
        """Identity of each planned row: of stream k, with k << 56 added."""
        parts = zip(self._numbers, self._parts, strict=True)
        return np.concatenate([p.ids | (k << STREAM_BITS) for k, p in parts])

    @property
    def digest(self) -> Digest:
        """The order hashes of the streams' parts, added up."""
        return sum((p.digest for p in self._parts), Digest())

    @property
    def rows(self) -> pa.Table:
        """The slice as an Arrow table."""
        return pa.concat_tables([p.rows for p in self._parts])

    @property
    def batch(self) -> Batch:
        """The slice as tensors."""
        batches = [p.batch for p in self._parts]
        return {name: _end_to_end([b[name] for b in batches]) for name in batches[0]}


def _end_to_end(values: list[Any]) -> Any:
    import torch

    full = [v for v in values if len(v)] or values[:1]
    if all(isinstance(v, torch.Tensor) for v in full):
        return torch.cat(full)
    return pa.concat_arrays(full)


class MixedShard:
    """An iterator over one rank's batches of a mixture; see :class:`lepton.stream.Shard`."""

    def __init__(self, mixture: Mixture, shards: list[Shard], batch_format: Format) -> None:
        self._mixture = mixture
        self._shards = shards
        self._format: Format = batch_format
        self.pin = False
        self.account = False
        self.agree: Callable[[int], int] | None = None
        self.rank = shards[0].rank
        self.world_size = shards[0].world_size

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._next(lambda part: formed(part, self._format))

    def __len__(self) -> int:
        """Steps that remain."""
        return len(self._shards[0])

    def next_part(self) -> MixedPart:
        """Return the next slice with its bookkeeping.

        Raises:
            StopIteration: all epochs of the first stream are done.
            StreamError: a file cannot be read; the next call begins again at the cursor.
        """
        return self._next(lambda part: part)

    def _next(self, use: Callable[[MixedPart], T]) -> T:
        marks = [shard.mark() for shard in self._shards]
        try:
            return use(self._joined())
        except BaseException as e:
            for shard, mark in zip(self._shards, marks, strict=True):
                shard.go_back(mark)
            if isinstance(e, LakeError | StreamError):
                raise StreamError(f"{e} [cursor: {self.state_dict()}]") from e
            raise

    def _joined(self) -> MixedPart:
        for shard in self._shards:
            shard.agree, shard.pin, shard.account = self.agree, self.pin, self.account
        first, *others = self._shards
        part = first.take(lambda part: part)
        shares = self._mixture.shares(part.global_rows)
        return MixedPart(part, [s.take_rows(n) for s, n in zip(others, shares, strict=True)])

    def state_dict(self) -> dict[str, Any]:
        """Return where every stream stands; equal on all ranks after the same step."""
        return self._mixture.state_of([s.state_dict() for s in self._shards])

    def load_state_dict(self, state: Mapping[str, Any] | str) -> None:
        """Go on from a state taken at any rank and any world size.

        Raises:
            StreamError: the state is not of this mixture.
        """
        for shard, its in zip(self._shards, self._mixture.states(state), strict=True):
            shard.load_state_dict(its)

    def close(self) -> None:
        """Stop reading ahead."""
        for shard in self._shards:
            shard.close()
