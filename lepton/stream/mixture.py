"""Several streams mixed in a fixed ratio: every global batch takes its rows from each of them.

The ratio is exact: a batch has ``batch_size`` rows of each stream. The first stream decides how
long an epoch is; the others begin again, in a new order, as often as they end. Order, world size
and resuming are those of the streams.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lepton.errors import StreamError
from lepton.lake import Snapshot
from lepton.stream.assembly import Part
from lepton.stream.cursor import cursor_of
from lepton.stream.order import Digest, Ints, Order
from lepton.stream.shard import Format, Shard, formed
from lepton.stream.stream import Engine, Stream
from lepton.stream.tensors import Batch
from lepton.telemetry import Carrier

if TYPE_CHECKING:
    import ray.data

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
    first = streams[0].empty.schema.remove_metadata()
    for other in streams[1:]:
        found = other.empty.schema.remove_metadata()
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

    def order(self, epoch: int) -> Order:
        """Return the first stream's order of an epoch."""
        return self.first.order(epoch)

    def with_lanes(self, most_workers: int) -> Mixture:
        """Return this mixture with lanes for so many workers; see :meth:`Stream.with_lanes`."""
        return Mixture(streams=tuple(s.with_lanes(most_workers) for s in self.streams))

    def read_by(self, engine: Engine, trace: Carrier | None) -> Mixture:
        """Return this mixture with another reader."""
        return Mixture(streams=tuple(s.read_by(engine, trace) for s in self.streams))

    def shard(
        self,
        rank: int,
        world_size: int,
        cursor: Mapping[str, Any] | None = None,
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

    def states(self, state: Mapping[str, Any] | None) -> list[Any]:
        """Return each stream's own state; None for each at the beginning.

        Raises:
            StreamError: the state is not of this mixture.
        """
        if state is None:
            return [None] * len(self.streams)
        found: Any = state.get("streams")
        if cursor_of(state).order != self.fingerprint or len(found or ()) != len(self.streams):
            raise StreamError(
                "the cursor is of another mixture: resume with the same streams (table versions, "
                "filters, batch sizes, seeds and lanes) in the same order, or start a new run"
            )
        return list(found)

    def hosted(self, most: int) -> HostedMixture:
        """Return this mixture with a coordinator per stream; see :class:`Hosted`."""
        return HostedMixture(self, most)

    def __call__(self) -> ray.data.Dataset:
        """Ray Train takes a function that makes a dataset: ``datasets={"train": mixture}``."""
        from lepton.stream.ray_dataset import dataset_of

        return dataset_of(self.first, split=self)


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

    def __init__(self, parts: list[Part]) -> None:
        self._parts = parts
        self.epoch = parts[0].epoch
        self.step = parts[0].step
        self.global_rows = sum(p.global_rows for p in parts)

    @property
    def delivered(self) -> int:
        """Rows in the slice."""
        return sum(p.delivered for p in self._parts)

    @cached_property
    def ids(self) -> Ints:
        """Identity of each planned row: of stream k, with k << 56 added."""
        return np.concatenate([p.ids | (k << STREAM_BITS) for k, p in enumerate(self._parts)])

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
        return formed(self.next_part(), self._format)

    def __len__(self) -> int:
        """Steps that remain."""
        return len(self._shards[0])

    def next_part(self) -> MixedPart:
        """Return the next slice with its bookkeeping.

        Raises:
            StopIteration: all epochs of the first stream are done.
        """
        for shard in self._shards:
            shard.agree, shard.pin, shard.account = self.agree, self.pin, self.account
        return MixedPart([s.next_part() for s in self._shards])

    def state_dict(self) -> dict[str, Any]:
        """Return where every stream stands; equal on all ranks after the same step."""
        states = [s.state_dict() for s in self._shards]
        return {**states[0], "order": self._mixture.fingerprint, "version": None, "streams": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
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
