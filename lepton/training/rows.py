"""A rank's rows of the present generation: the shard that is open, and where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lepton.stream import Part, Shard
from lepton.stream.mixture import MixedPart, MixedShard
from lepton.training.group import Group
from lepton.training.plan import Opener


class Rows:
    """Opens one shard after another, each for a rank of a generation.

    Args:
        opener: opens the stream's shards.
        group: the ranks.
        device: where batches go.
    """

    def __init__(self, opener: Opener, group: Group, device: torch.device) -> None:
        self._opener = opener
        self._group = group
        self._device = device
        self._shard: Shard | MixedShard | None = None

    def open(self, cursor: Mapping[str, Any] | None, number: int) -> None:
        """Open this rank's shard of a generation where the stream stands."""
        self.close()
        self._shard = self._opener(self._group.rank, self._group.world_size, cursor, number)
        self._shard.agree = self._version_of_rank_0
        self._shard.account = True
        self._shard.pin = self._device.type == "cuda"  # a batch is held until its step is done

    def next_part(self) -> Part | MixedPart | None:
        """Return this rank's slice of the next global batch; None after the last one.

        Raises:
            PeerLost: a worker went away while agreeing on the version of a followed table.
        """
        try:
            return self._open.next_part()
        except StopIteration:
            return None

    def on_device(self, part: Part | MixedPart) -> dict[str, Any]:
        """Return a slice's columns, tensors on the device."""
        return {
            k: v.to(self._device, non_blocking=True) if isinstance(v, torch.Tensor) else v
            for k, v in part.batch.items()
        }

    @property
    def cursor(self) -> Mapping[str, Any]:
        """Where the stream stands: after the part that was returned last."""
        return self._open.state_dict()

    def close(self) -> None:
        """Close the shard, if one is open."""
        if self._shard is not None:
            self._shard.close()

    def _version_of_rank_0(self, version: int) -> int:
        """Settle on one table version for the next epoch."""
        return int(self._group.share(version, 0))

    @property
    def _open(self) -> Shard | MixedShard:
        assert self._shard is not None  # noqa: S101 - attach has opened it
        return self._shard
