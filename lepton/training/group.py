"""The workers' collectives, over generations of a process group.

``torch.distributed``'s default group is made anew for every generation. A collective that breaks
because a peer went away raises :class:`PeerLost`; the group is then left, which closes its
connections, so that peers which only talk to survivors notice too, and the next one is joined.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lepton.errors import TrainingError
from lepton.training.seat import Place, Seat

_dist: Any = dist  # whose stubs leave much of it out

JOIN_S = 15.0
"""How long a new group may take to connect before its members try again."""
COLLECTIVE_S = 120.0
"""How long a collective waits for a peer that neither died nor fell silent. A slower one costs a
step that is made again, nothing else."""
TRIES = 20
"""How often a group is made anew without one step in between before the run gives up."""


class PeerLost(RuntimeError):  # noqa: N818 - the event, not the person's mistake
    """A collective broke because another worker went away."""


class Rewound(BaseException):  # no failure, and no `except Exception` may stop it
    """The ranks of a sharded model change: the loop begins anew, from the newest checkpoint."""


class OwnPart:
    """How long a worker takes from asking for a batch until it has to wait for the others."""

    def __init__(self) -> None:
        self._began = self._smooth = 0.0

    def begin(self) -> None:
        """A batch is asked for."""
        self._began = time.monotonic()

    def end(self) -> None:
        """The first collective of the step is entered."""
        if self._began:
            took, self._began = time.monotonic() - self._began, 0.0
            self._smooth = (self._smooth + took) / 2 if self._smooth else took

    def seconds(self) -> float:
        """Return what it took lately, or takes already; asked from another thread."""
        began = self._began
        return max(self._smooth, time.monotonic() - began if began else 0.0)


class Group:
    """This worker's place among the others.

    Args:
        seat: its seat at the rendezvous; None for a run of one worker in this process.
        device: where collectives run.

    Attributes:
        place: the current place.
        part: how long this worker's own part of a step takes.
    """

    def __init__(self, seat: Seat | None, device: torch.device) -> None:
        self.seat = seat
        self.place = _ALONE
        self.part = OwnPart()
        self._device = device
        self._store: Any = None

    @property
    def rank(self) -> int:
        """Of this worker in the generation."""
        return self.place.rank

    @property
    def world_size(self) -> int:
        """Workers in the generation."""
        return self.place.world_size

    def join(self, step: int | None) -> Place:
        """Leave the present generation and join the next; return this worker's place in it.

        Args:
            step: steps that this worker's state has seen; None without state.

        Raises:
            PeerLost: a member went away while the group was made: join again.
            Released: this worker is to leave, or the run has ended.
            TrainingError: the run was stopped by another worker's error.
        """
        self.leave()
        if self.seat is None:
            return self.place
        self.part = OwnPart()
        self.seat.own_part = self.part.seconds
        self.place = self.seat.arrive(step)
        if self.world_size == 1:
            self.seat.offer(self.place.number, 0)
            return self.place
        self._run(self._connect, self.seat)
        return self.place

    def meet(self, step: int | None, then: Callable[[Place], None] | None = None) -> Place:
        """Join the next generation, however often it takes; see :meth:`join`.

        Args:
            step: steps that this worker's state has seen; None without state.
            then: what belongs to joining; where it loses a peer, all of it is tried again.

        Raises:
            Released: this worker is to leave, or the run has ended.
            TrainingError: the run was stopped, or the workers cannot connect to each other.
        """
        reason: PeerLost | None = None
        for _ in range(TRIES):
            try:
                place = self.join(step)
                if then is not None:
                    then(place)
            except PeerLost as e:
                reason = e
                continue
            return place
        raise TrainingError(
            f"the workers cannot connect to each other after {TRIES} tries: {reason}"
        )

    def stands_at(self, step: int) -> None:
        """Note how many steps this worker's state has seen, for whoever asks how the run is."""
        if self.seat is not None:
            self.seat.step = step

    def connect_alone(self) -> None:
        """Make a process group of this worker alone, for what needs one at any size."""
        if not dist.is_initialized():
            store = _dist.HashStore()
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)

    def has_lost(self, wait_s: float) -> bool:
        """Whether a member of the generation was lost; the word may come a moment after it."""
        return self.seat is not None and self.seat.lost.wait(wait_s)

    def _connect(self, seat: Seat) -> None:
        wait = timedelta(seconds=JOIN_S)
        if self.rank == 0:
            # The server is held apart from the connection to it, so that dropping it, when a
            # member is lost, ends everybody's waiting for that member.
            self._store = _dist.TCPStore(seat.host, 0, None, True, wait, wait_for_workers=False)
            seat.broken = self._drop_store
            where = (seat.host, int(self._store.port))
            seat.offer(self.place.number, where[1])
        else:
            assert self.place.store is not None  # noqa: S101 - only rank 0 is invited without
            where = self.place.store
        store = _dist.TCPStore(*where, None, False, wait, wait_for_workers=False)
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if backend == "nccl" else backend,
            store=_dist.PrefixStore(f"generation-{self.place.number}", store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=COLLECTIVE_S),
        )

    def _drop_store(self) -> None:
        self._store = None

    def leave(self) -> None:
        """Leave the process group, closing its connections."""
        if self.seat is not None:
            self.seat.broken = self._drop_store
        if dist.is_initialized():
            dist.destroy_process_group()
        self._store = None

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum a tensor over all ranks, in place.

        Raises:
            PeerLost: another worker went away.
        """
        if self.world_size > 1:
            self.part.end()
            self._run(_dist.all_reduce, tensor)

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> None:
        """Give every rank the source's tensor, in place.

        Raises:
            PeerLost: another worker went away.
        """
        if self.world_size > 1:
            self._run(dist.broadcast, tensor, source)

    def share(self, value: Any, source: int) -> Any:
        """Return the source's value (numbers, strings, lists, dicts) on every rank.

        Raises:
            PeerLost: another worker went away.
        """
        box = [value]
        if self.world_size > 1:
            self._run(dist.broadcast_object_list, box, source)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value (numbers, strings, lists, dicts), by rank.

        Raises:
            PeerLost: another worker went away.
        """
        found = [value] * self.world_size
        if self.world_size > 1:
            self._run(_dist.all_gather_object, found, value)
        return found

    def _run(self, collective: Callable[..., Any], *arguments: Any) -> None:
        reason = ""
        try:
            collective(*arguments)
        except (RuntimeError, ValueError) as e:  # what torch raises, whatever happened to the peer
            reason = f"{type(e).__name__}: {e}"
        if reason:  # outside of the handler: its traceback would keep the connections open
            raise PeerLost(f"rank {self.rank} of {self.world_size} lost a peer: {reason}")


_ALONE = Place(
    number=0,
    rank=0,
    world_size=1,
    source=None,
    behind=(),
    pids=(),
    hosts=(),
    store=None,
)


def device_here() -> torch.device:
    """Return this worker's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
