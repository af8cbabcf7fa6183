"""How a run ends at its rendezvous, whoever comes or goes at that very moment. Real connections."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from lepton.training.membership import Membership
from lepton.training.rendezvous import Rendezvous
from lepton.training.seat import Invitation, Place, Released, Seat


class Table:
    """A rendezvous in a thread of its own, and the seats at it."""

    def __init__(self, most: int) -> None:
        self.rendezvous = Rendezvous(
            membership=Membership(fewest=1, most=most, expected=most), token="t", hung=self._hung
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        port = self.do(self.rendezvous.open("127.0.0.1"))
        self._invitation = Invitation(host="127.0.0.1", port=port, token="t")
        self._pool = ThreadPoolExecutor(8)
        self.seats: list[Seat] = []

    async def _hung(self, pid: int, host: str, node: str) -> None:
        raise AssertionError("nobody is silent here")

    def do(self, what: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(30)

    def sit(self) -> Seat:
        self.seats.append(Seat(self._invitation))
        return self.seats[-1]

    def soon(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return self._pool.submit(call, *arguments)

    def arrive(self, seat: Seat, step: int | None = None) -> Future[Place]:
        """Join the next generation, offering its store where this seat leads it."""

        def join() -> Place:
            place = seat.arrive(step)
            if place.rank == 0:
                seat.offer(place.number, 1)
            return place

        return self.soon(join)

    def until(self, condition: Callable[[Rendezvous], bool]) -> None:
        async def look() -> bool:
            return condition(self.rendezvous)

        end = time.monotonic() + 180
        while not self.do(look()):
            assert time.monotonic() < end, self.rendezvous.status()
            time.sleep(0.005)

    def close(self) -> None:
        for seat in self.seats:
            seat.close()
        self.do(self.rendezvous.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()
        self._pool.shutdown(cancel_futures=True)


@pytest.fixture
def table() -> Iterator[Callable[[int], Table]]:
    made: list[Table] = []

    def lay(most: int) -> Table:
        made.append(Table(most))
        return made[-1]

    yield lay
    for one in made:
        one.close()


def is_done(seat: Seat) -> Callable[[Rendezvous], bool]:
    return lambda r: r._guests[seat.name].done is not None  # what a test may look at


def test_a_spare_that_comes_while_the_members_end_keeps_nobody(
    table: Callable[[int], Table],
) -> None:
    run = table(2)
    first, second = run.sit(), run.sit()
    for place in [run.arrive(first), run.arrive(second)]:
        assert place.result(30).world_size == 2
    ends = run.soon(first.done, 7)
    run.until(is_done(first))
    spare = run.arrive(run.sit())
    run.until(lambda r: len(r.membership.waiting) == 1)

    assert run.soon(second.done, 7).result(30)
    assert ends.result(30)
    with pytest.raises(Released):
        spare.result(30)


def test_who_is_done_after_the_others_came_together_again_joins_them(
    table: Callable[[int], Table],
) -> None:
    run = table(3)
    seats = {run.arrive(seat): seat for seat in (run.sit(), run.sit(), run.sit())}
    leader, early, late = (seats[p] for p in sorted(seats, key=lambda p: p.result(30).rank))
    ends = run.soon(early.done, 7)
    run.until(is_done(early))
    leader.close()
    assert not ends.result(30), "the checkpoint was the lost leader's to write"
    again = run.arrive(early, 7)
    run.until(lambda r: early.name in r.membership.waiting)

    assert not run.soon(late.done, 7).result(30)
    joined = run.arrive(late, 7)
    assert [p.result(30).world_size for p in (again, joined)] == [2, 2]
    assert all(f.result(30) for f in [run.soon(s.done, 7) for s in (early, late)])


def test_without_its_first_rank_a_generation_does_not_end(table: Callable[[int], Table]) -> None:
    run = table(3)
    seats = {run.arrive(seat): seat for seat in (run.sit(), run.sit(), run.sit())}
    leader, one, other = (seats[p] for p in sorted(seats, key=lambda p: p.result(30).rank))
    leader.close()
    run.until(lambda r: leader.name not in r._guests)

    assert not run.soon(one.done, 7).result(30), "nobody has written the last checkpoint"
    again = run.arrive(one, 7)
    assert not run.soon(other.done, 7).result(30)
    joined = run.arrive(other, 7)
    assert {p.result(30).rank for p in (again, joined)} == {0, 1}
