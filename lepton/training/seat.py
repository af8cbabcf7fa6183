"""A worker's seat at the rendezvous: one connection, and a thread that listens to it."""

from __future__ import annotations

import json
import os
import queue
import socket
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from lepton.errors import TrainingError
from lepton.training.rendezvous import BEAT_S

CONNECT_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Invitation:
    """Where the workers of a run meet.

    Attributes:
        host, port: of the rendezvous.
        token: what it asks for.
    """

    host: str
    port: int
    token: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A worker's place in a generation; see :class:`lepton.training.membership.Generation`."""

    number: int
    rank: int
    world_size: int
    source: int | None
    behind: tuple[int, ...]
    pids: tuple[int, ...]
    hosts: tuple[str, ...]
    store: tuple[str, int] | None


class Stopped(TrainingError):  # noqa: N818 - the event, not its cause
    """The run was stopped by what another worker's loop raised."""


class Released(BaseException):  # no failure, and no `except Exception` may stop it
    """This worker's part in the run is over: its node goes away, or the run ended without it."""


class Leaving(Released):
    """This worker's node goes away; the run goes on without it."""


class Seat:
    """A worker's connection to the rendezvous.

    Args:
        invitation: where it is.
        node: id of the worker's node, to tell whom a draining node concerns.
        host: address under which the other workers reach this one.

    Raises:
        TrainingError: nobody answers there.
    """

    def __init__(self, invitation: Invitation, *, node: str = "", host: str = "127.0.0.1") -> None:
        self.host = host
        self.name = f"{node[:6] or host}-{os.getpid()}-{uuid.uuid4().hex[:4]}"
        self.step = 0
        self.own_part: Callable[[], float] = _no_time
        """Returns how long this worker's own part of a step takes, seconds; 0: not known."""
        self.called = False
        """The generation should come together at the next boundary."""
        self.leaving = False
        """ ... to let somebody go, so a checkpoint is due before."""
        self.lost = threading.Event()
        """A member of the generation was lost since it began."""
        self.broken: Callable[[], None] = _nothing
        """Called, from the listening thread, when a member of the generation is lost."""
        self._answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._writing = threading.Lock()
        where = (invitation.host, invitation.port)
        try:
            self._socket = socket.create_connection(where, CONNECT_S)
        except OSError as e:
            raise TrainingError(
                f"the run's rendezvous at {where[0]}:{where[1]} does not answer ({e}): the driver "
                "has ended, or a firewall is between the nodes"
            ) from e
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        hello = {"token": invitation.token, "name": self.name, "pid": os.getpid()}
        self._write({**hello, "host": host, "node": node})
        threading.Thread(target=self._listen, daemon=True, name="lepton-seat").start()
        threading.Thread(target=self._beat, daemon=True, name="lepton-beat").start()

    def arrive(self, step: int | None) -> Place:
        """Wait for the next generation and return this worker's place in it.

        Args:
            step: steps that this worker's state has seen; None without state.

        Raises:
            Released: this worker is to leave, or the run has ended.
            TrainingError: the run was stopped by another worker's error.
        """
        self._say(say="arrive", step=step)
        answer = self._await("generation")
        self.lost.clear()
        self.called = self.leaving = False
        store = answer["store"]
        return Place(
            number=answer["number"],
            rank=answer["rank"],
            world_size=answer["world_size"],
            source=answer["source"],
            behind=tuple(answer["behind"]),
            pids=tuple(answer["pids"]),
            hosts=tuple(answer["hosts"]),
            store=None if store is None else (store[0], store[1]),
        )

    def offer(self, number: int, port: int) -> None:
        """Say, as rank 0, where the generation's store listens."""
        self._say(say="store", store=[number, self.host, port])

    def done(self, step: int) -> bool:
        """Say that the loop has ended and wait for the others.

        Returns:
            whether the run is finished; False: a peer was lost, come together once more.

        Raises:
            TrainingError: the run was stopped, or the ranks made different numbers of steps.
        """
        self._say(say="done", step=step)
        return self._await("finished", "regroup")["say"] == "finished"

    def leave(self, error: str = "") -> None:
        """End this worker's part; with an error, everybody's."""
        self._say(say="leave", error=error)
        self.close()

    def wait_closed(self) -> None:
        """Wait until the run is over and the other end closes."""
        self._closed.wait()

    def close(self) -> None:
        """Close the connection."""
        self._closed.set()
        with suppress(OSError):  # the other end was quicker
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _await(self, *wanted: str) -> dict[str, Any]:
        while True:
            answer = self._answers.get()
            match answer["say"]:
                case say if say in wanted:
                    return answer
                case "stop":
                    raise Stopped(answer["error"])
                case "released":
                    raise Leaving("its node is going away")
                case "finished":
                    raise Released("the run has finished")
                case "closed":
                    raise TrainingError("the run's rendezvous is gone: its driver has ended")
                case _:
                    continue

    def _listen(self) -> None:
        try:
            for line in self._socket.makefile("rb"):
                message = json.loads(line)
                if message["say"] == "called":
                    self.leaving = self.leaving or message["leaving"]
                    self.called = True
                elif message["say"] == "broken":
                    self.lost.set()
                    self.broken()
                else:
                    self._answers.put(message)
        except (OSError, ValueError):
            pass  # told below
        self._closed.set()
        self._answers.put({"say": "closed"})

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_S):
            self._say(say="beat", step=self.step, own_s=self.own_part())

    def _say(self, **message: Any) -> None:
        self._write(message)

    def _write(self, message: dict[str, Any]) -> None:
        try:
            with self._writing:
                self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self._closed.set()  # whoever waits for an answer is told by the listening thread


def _nothing() -> None:
    pass


def _no_time() -> float:
    return 0.0
