"""Where the workers of a run meet: a small TCP service, and a worker's seat at it.

Every worker holds one connection open. A process that is killed closes it at once, so a death is
known within milliseconds and for certain, without a grace period; a process that is stopped keeps
it open and falls silent, which :attr:`Rendezvous.hang_s` bounds. Messages are JSON, one a line.
Neither Ray nor torch is needed here.

    worker -> service   hello, arrive, store, beat, done, leave
    service -> worker   generation, called, broken, released, finished, regroup, stop
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from lepton.training.membership import Generation, Membership
from lepton.training.stragglers import Stragglers

TICK_S = 0.1
BEAT_S = 0.25


@dataclass
class _Guest:
    """A connected worker."""

    name: str
    pid: int
    host: str
    node: str
    writer: asyncio.StreamWriter
    heard: float
    step: int = 0
    own_s: float = 0.0
    done: int | None = None
    suspected: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that happened to the membership.

    Attributes:
        kind: ``began``, ``lost``, ``hung``, ``slow``, ``left``, ``joined``, ``finished``.
        who: name of the worker, or empty.
        world_size: workers in the generation then.
        step: steps made as far as was known.
        time_ns: Unix nanoseconds.
        detail: more about it, in words.
    """

    kind: str
    who: str
    world_size: int
    step: int
    time_ns: int
    detail: str = ""


@dataclass
class Rendezvous:
    """The service. Runs in one event loop, so that every message is handled alone.

    Attributes:
        membership: who decides.
        token: what a worker must say to be let in.
        hung: called with (pid, host, node) of a worker that fell silent, to end it.
        hang_s: silence that counts as hung, seconds.
        stragglers: decides who holds the others up.
        clock: seconds, steady.
    """

    membership: Membership
    token: str
    hung: Callable[[int, str, str], Awaitable[None]]
    hang_s: float = 10.0
    stragglers: Stragglers = field(default_factory=Stragglers)
    clock: Callable[[], float] = time.monotonic
    events: list[Event] = field(default_factory=list[Event])
    finished: bool = False
    error: str = ""
    _guests: dict[str, _Guest] = field(default_factory=dict[str, _Guest])
    _released: list[_Guest] = field(default_factory=list[_Guest])
    _leads: str = ""
    _called: tuple[int, bool] = (-1, False)
    _server: asyncio.Server | None = None
    _ticker: asyncio.Task[None] | None = None

    async def open(self, host: str = "0.0.0.0") -> int:  # noqa: S104 - workers of other nodes come
        """Begin to listen; return the port."""
        self._server = await asyncio.start_server(self._welcome, host, 0)
        self._ticker = asyncio.create_task(self._tick())
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop listening and end every connection."""
        if self._ticker is not None:
            self._ticker.cancel()
        guests = [*self._guests.values(), *self._released]
        for guest in guests:
            guest.writer.close()
        for guest in guests:
            with suppress(OSError):
                await guest.writer.wait_closed()
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    def status(self) -> dict[str, Any]:
        """Return what the driver shows: members with their steps, spares, events, the end."""
        members = self.membership.members
        return {
            "members": {m: self._guests[m].step for m in members if m in self._guests},
            "waiting": [m for m in self.membership.waiting if m not in members],
            "pids": {g.name: g.pid for g in self._guests.values()},
            "finished": self.finished,
            "error": self.error,
            "events": list(self.events),
        }

    async def release_nodes(self, nodes: set[str]) -> None:
        """Let every worker on these nodes go at the next boundary."""
        for guest in self._guests.values():
            if guest.node in nodes:
                self.membership.release(guest.name)
        self._advance()

    # -- connections ----------------------------------------------------------------------------

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        guest: _Guest | None = None
        try:
            hello = json.loads(await asyncio.wait_for(reader.readline(), self.hang_s))
            if not hmac.compare_digest(str(hello.get("token", "")), self.token):
                return
            guest = _Guest(
                name=hello["name"],
                pid=hello["pid"],
                host=hello["host"],
                node=hello["node"],
                writer=writer,
                heard=self.clock(),
            )
            self._guests[guest.name] = guest
            self.membership.enter(guest.name)
            while line := await reader.readline():
                guest.heard = self.clock()
                self._hear(guest, json.loads(line))
        except (OSError, TimeoutError, json.JSONDecodeError):
            pass  # the connection is over, which is what counts
        finally:
            writer.close()
            if guest is not None and self._guests.get(guest.name) is guest:
                self._lost(guest)

    def _hear(self, guest: _Guest, message: dict[str, Any]) -> None:
        guest.step = message.get("step") or guest.step
        guest.own_s = message.get("own_s", guest.own_s)
        match message["say"]:
            case "arrive":
                if not self._refuse(guest):
                    guest.done = None
                    self.membership.arrive(guest.name, message["step"], self.clock())
                    if guest.name in self.membership.members:  # a spare is no reason to meet
                        self._call_back_the_done()
            case "store":
                self._tell_all(message["store"])
            case "done":
                guest.done = message["step"]
                if self._meets_again():
                    self._call_back_the_done()
                else:
                    self._end_if_done()
            case "leave":
                self.error = self.error or message.get("error", "")
                self._stop_all()
                self._record("left", guest.name)
                self._forget(guest)
            case _:
                pass  # a beat
        self._advance()

    def _refuse(self, guest: _Guest) -> bool:
        if self.error:
            self._send(guest, {"say": "stop", "error": self.error})
        elif self.finished:
            self._send(guest, {"say": "finished"})
        return bool(self.error) or self.finished

    def _lost(self, guest: _Guest) -> None:
        member = guest.name in self.membership.members
        self._forget(guest)
        if not self.finished:
            self._record("lost", guest.name)
        if member and not self.finished:
            self._break(guest.name)
            self._end_if_done()
        self._advance()

    def _forget(self, guest: _Guest) -> None:
        self._guests.pop(guest.name, None)
        self.membership.lose(guest.name)

    def _break(self, lost: str) -> None:
        """Tell the rest that their generation is broken: nobody waits for the one that is gone."""
        for name in self.membership.members:
            self._send(self._guests.get(name), {"say": "broken"})
        if lost == self._leads:
            self._call_back_the_done()

    # -- the end of a run -----------------------------------------------------------------------

    def _meets_again(self) -> bool:
        """Whether the generation cannot end as it is.

        Members wait for the next one already, or rank 0, who writes the last checkpoint, is gone.
        """
        members = self.membership.members
        return self._leads not in members or any(m in self.membership.waiting for m in members)

    def _call_back_the_done(self) -> None:
        """Members that wait for the end are wanted again: a peer has to make its last step."""
        for guest in self._guests.values():
            if guest.done is not None and guest.name in self.membership.members:
                guest.done = None
                self._send(guest, {"say": "regroup"})

    def _end_if_done(self) -> None:
        members = [self._guests[m] for m in self.membership.members if m in self._guests]
        if not members or any(g.done is None for g in members):
            return
        if len({g.done for g in members}) > 1:
            steps = {g.name: g.done for g in members}
            self.error = (
                f"ranks ended their loops after different numbers of steps ({steps}): every rank "
                "must make every step"
            )
            self._stop_all()
            return
        self.finished = True
        self._record("finished", "")
        for guest in self._guests.values():
            self._send(guest, {"say": "finished"})
        for guest in self._released:
            guest.writer.close()

    def _stop_all(self) -> None:
        if self.error:
            for guest in self._guests.values():
                self._send(guest, {"say": "stop", "error": self.error})

    # -- generations ----------------------------------------------------------------------------

    def _advance(self) -> None:
        """Do whatever the membership now decides."""
        if self.finished or self.error:
            return
        for name in self.membership.depart():
            self._record("left", name)
            guest = self._guests.pop(name, None)
            self._send(guest, {"say": "released"})
            if guest is not None:
                self._released.append(guest)
        generation = self.membership.form(self.clock())
        if generation is not None:
            self._leads = generation.members[0]
            self._send(self._guests[self._leads], self._place(generation, 0, None))
        call = (self.membership.number, bool(self.membership.leaving))
        if self.membership.calls and call != self._called:
            self._called = call
            for name in self.membership.members:
                self._send(self._guests.get(name), {"say": "called", "leaving": call[1]})

    def _tell_all(self, store: list[Any]) -> None:
        """Rank 0 has opened the generation's store: send the others to it."""
        generation = self.membership.forming
        if generation is None or list(store[:1]) != [generation.number]:
            return
        for rank, name in enumerate(generation.members[1:], start=1):
            self._send(self._guests[name], self._place(generation, rank, store[1:]))
        self.membership.formed()
        fresh = generation.source is None
        for name, step in generation.steps.items():
            if fresh or step is None:
                self._record("began" if fresh else "joined", name)

    def _place(self, generation: Generation, rank: int, store: Any) -> dict[str, Any]:
        guests = [self._guests[m] for m in generation.members]
        return {
            "say": "generation",
            "number": generation.number,
            "rank": rank,
            "world_size": len(guests),
            "source": generation.source,
            "behind": generation.behind,
            "pids": [g.pid for g in guests],
            "hosts": [g.host for g in guests],
            "store": store,
        }

    def _send(self, guest: _Guest | None, message: dict[str, Any]) -> None:
        if guest is not None and not guest.writer.is_closing():
            guest.writer.write(json.dumps(message).encode() + b"\n")

    def _name_stragglers(self) -> None:
        members = [self._guests[m] for m in self.membership.members if m in self._guests]
        own = {g.name: g.own_s for g in members if g.own_s and g.done is None}
        for slow in self.stragglers.look(own, self.clock()):
            self._record("slow", slow.who, slow.text)

    def _record(self, kind: str, who: str, detail: str = "") -> None:
        step = max((g.step for g in self._guests.values()), default=0)
        size = len(self.membership.members)
        now = time.time_ns()
        self.events.append(
            Event(kind=kind, who=who, world_size=size, step=step, time_ns=now, detail=detail)
        )

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._advance()
            self._name_stragglers()
            now = self.clock()
            for guest in list(self._guests.values()):
                if now - guest.heard > self.hang_s and not guest.suspected:
                    guest.suspected = True
                    self._record("hung", guest.name)
                    await self.hung(guest.pid, guest.host, guest.node)
