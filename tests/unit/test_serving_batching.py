"""Batches form from what waits; whoever is not to blame is answered; nothing waits without end."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton.serving.batching import TIMED_EVERY, Batcher, Overloaded
from lepton.serving.pace import BATCH_S, BELIEVED, INLINE_S, LONGEST_WAIT_S, MEMORY, MOST_ROWS, Pace


def rows(*values: float) -> pa.Table:
    return pa.table({"x": list(values)})


class Net:
    """Doubles its input; holds its first run until it is let go; remembers what it was given."""

    def __init__(self, *, held: bool = True) -> None:
        self.seen: list[list[float]] = []
        self.go = threading.Event()
        self.running = threading.Event()
        if not held:
            self.go.set()

    def run(self, table: pa.Table) -> dict[str, np.ndarray[Any, Any]]:
        self.seen.append(table["x"].to_pylist())
        self.running.set()
        self.go.wait(30)
        if -1.0 in self.seen[-1]:
            raise RuntimeError("minus one")
        return {"y": np.array(self.seen[-1]) * 2}


@pytest.fixture
def batcher() -> Iterator[Batcher]:
    made = Batcher()
    yield made
    made.close()


async def under_way(batcher: Batcher, net: Net, *tables: pa.Table) -> list[asyncio.Task[Any]]:
    """Ask for all; return when the first runs and the others wait."""
    tasks = [asyncio.create_task(batcher.answer(net.run, tables[0]))]
    await asyncio.to_thread(net.running.wait, 30)
    tasks += [asyncio.create_task(batcher.answer(net.run, t)) for t in tables[1:]]
    await asyncio.sleep(0)
    return tasks


def test_what_came_meanwhile_is_one_batch(batcher: Batcher) -> None:
    async def scene() -> None:
        net = Net()
        batcher._known(net.run).took(10, 0.02)
        tasks = await under_way(batcher, net, *(rows(i, i + 0.5) for i in range(5)))
        net.go.set()
        answers = await asyncio.gather(*tasks)

        assert [a["y"].tolist() for a in answers] == [[2 * i, 2 * i + 1] for i in range(5)]
        assert net.seen == [[0, 0.5], [1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5]]

    asyncio.run(scene())
    assert batcher.waiting_rows == 0


def test_a_batch_is_told_by_its_rows_and_the_queue_by_its_requests() -> None:
    told: list[int] = []
    batcher = Batcher(told=told.append)

    async def scene() -> None:
        net = Net()
        batcher._known(net.run).took(10, 0.02)
        tasks = await under_way(batcher, net, *(rows(i, i + 0.5) for i in range(5)))
        assert (batcher.waiting_requests, batcher.waiting_rows) == (5, 10)
        net.go.set()
        await asyncio.gather(*tasks)

    asyncio.run(scene())
    batcher.close()
    assert told == [2, 8]
    assert batcher.waiting_requests == 0


def test_only_the_request_that_is_to_blame_fails(batcher: Batcher) -> None:
    async def scene() -> None:
        net = Net()
        batcher._known(net.run).took(10, 0.02)
        tasks = await under_way(batcher, net, rows(1), rows(2), rows(-1), rows(3))
        net.go.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)

        assert isinstance(found[2], RuntimeError)
        assert [found[i]["y"].tolist() for i in (0, 1, 3)] == [[2], [4], [6]]

    asyncio.run(scene())


def test_a_request_nobody_waits_for_is_not_run(batcher: Batcher) -> None:
    async def scene() -> None:
        net = Net()
        batcher._known(net.run).took(10, 0.02)
        tasks = await under_way(batcher, net, rows(1), rows(2), rows(3))
        tasks[1].cancel()
        await asyncio.wait([tasks[1]])
        net.go.set()
        await asyncio.gather(tasks[0], tasks[2])

        assert net.seen == [[1], [3]]

    asyncio.run(scene())
    assert batcher.waiting_rows == 0


@pytest.mark.parametrize("patience_s", [None, 0.01])
def test_who_leaves_gives_his_place_to_others(batcher: Batcher, patience_s: float | None) -> None:
    """Who is told that a queue is too long must not be told so of those who left it."""

    async def scene() -> None:
        net = Net()
        batcher._known(net.run).took(1, 1.0)  # a second a row
        tasks = await under_way(batcher, net, rows(1))
        ask = batcher.answer(net.run, rows(2, 3, 4), patience_s)
        leaving = asyncio.create_task(ask)
        await asyncio.sleep(0)
        assert batcher.waiting_rows == 4
        with pytest.raises(Overloaded):
            await batcher.answer(net.run, rows(5))
        if patience_s is None:
            leaving.cancel()
        await asyncio.wait([leaving])
        assert (batcher.waiting_requests, batcher.waiting_rows) == (1, 1)
        tasks.append(asyncio.create_task(batcher.answer(net.run, rows(5))))
        await asyncio.sleep(0)
        net.go.set()
        assert [a["y"].tolist() for a in await asyncio.gather(*tasks)] == [[2], [10]]
        assert net.seen == [[1], [5]]

    asyncio.run(scene())
    assert (batcher.waiting_requests, batcher.waiting_rows) == (0, 0)


def test_too_long_a_queue_is_refused_with_the_time_it_needs(batcher: Batcher) -> None:
    async def scene() -> None:
        net = Net()
        batcher._known(net.run).took(1, 1.0)  # a second a row
        tasks = await under_way(batcher, net, rows(1), rows(2), rows(3))
        with pytest.raises(Overloaded) as refused:
            await batcher.answer(net.run, rows(4))
        assert refused.value.retry_after_s == 3
        net.go.set()
        await asyncio.gather(*tasks)
        assert (await batcher.answer(net.run, rows(5)))["y"].tolist() == [10]

    asyncio.run(scene())


def test_a_quick_net_runs_where_it_is_asked_and_a_slow_one_in_a_thread(batcher: Batcher) -> None:
    async def thread_of(seconds: float) -> str:
        names: list[str] = []

        def run(table: pa.Table) -> dict[str, Any]:
            names.append(threading.current_thread().name)
            return {"y": np.zeros(len(table))}

        batcher._known(run).took(1, seconds)
        await batcher.answer(run, rows(1))
        return names[0]

    assert asyncio.run(thread_of(INLINE_S / 2)) == threading.current_thread().name
    assert asyncio.run(thread_of(INLINE_S * 2)) == "lepton-batches"


def test_a_model_that_is_known_to_be_quick_is_timed_now_and_then(batcher: Batcher) -> None:
    """And so it is found out when it is quick no more."""
    net = Net(held=False)
    pace = batcher._known(net.run)
    for _ in range(MEMORY):
        pace.took(1, INLINE_S / 100)
    for _ in range(3 * TIMED_EVERY):
        assert batcher.at_once(net.run, rows(1)) is not None
    assert pace.own.runs == MEMORY + 3
    for _ in range(MEMORY):
        pace.took(1, INLINE_S * 2)
    assert batcher.at_once(net.run, rows(1)) is None


@given(
    fixed=st.floats(1e-6, 0.02),
    row=st.floats(1e-7, 0.01),
    sizes=st.lists(st.integers(1, 500), min_size=3, max_size=40),
)
def test_the_line_through_the_runs_is_found(fixed: float, row: float, sizes: list[int]) -> None:
    pace = Pace()
    for size in sizes:
        pace.took(size, fixed + row * size)
    assert pace.clock.row_s >= 0
    assert 1 <= pace.most_rows <= MOST_ROWS
    if len(set(sizes[1:])) > 1:  # the first one warms up
        assert pace.clock.row_s == pytest.approx(row, rel=1e-3)
        assert pace.clock.run_s(100) == pytest.approx(fixed + 100 * row, rel=1e-3)
        assert pace.most_rows == 1 or pace.clock.run_s(pace.most_rows) <= BATCH_S * 1.001
        few, many = int(LONGEST_WAIT_S / row * 0.99), int(LONGEST_WAIT_S / row * 1.01) + 1
        assert pace.retry_after_s(few) is None
        assert pace.retry_after_s(many) is not None


def test_an_unknown_pace_decides_carefully() -> None:
    pace = Pace()
    assert not pace.inline_for(1)
    assert pace.most_rows == 1
    assert pace.retry_after_s(10**6) is None


def test_a_version_that_is_gone_is_not_kept_by_its_pace(batcher: Batcher) -> None:
    net = Net(held=False)
    asyncio.run(batcher.answer(net.run, rows(1.0)))
    assert batcher._known(net.run).clock.runs == 1
    gone = weakref.ref(net)
    del net
    end = time.monotonic() + 60
    while gone() is not None and time.monotonic() < end:  # its thread may have it in its hands yet
        gc.collect()
    assert gone() is None


def test_far_more_rows_than_any_run_had_are_not_run_where_they_are_read(batcher: Batcher) -> None:
    """What a row costs cannot be seen in runs of one size, and is little beside a call's cost."""
    net = Net(held=False)
    pace = batcher._known(net.run)
    for _ in range(MEMORY):
        pace.took(1, INLINE_S / 100)
        pace.took(4, INLINE_S / 200)  # a slope of nothing
    assert batcher.is_quick(net.run, 4 * BELIEVED)
    assert not batcher.is_quick(net.run, 4 * BELIEVED + 1)
    assert batcher.at_once(net.run, rows(*range(4 * BELIEVED + 1))) is None
    runs = pace.own.runs
    for _ in range(TIMED_EVERY):  # of those that are larger than any before, the first is timed
        assert batcher.at_once(net.run, rows(*range(8))) is not None
    assert runs < pace.own.runs <= runs + 2
    assert pace.largest == 8
