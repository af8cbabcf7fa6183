"""Requests of one turn of the event loop: one run, and to each its own."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from lepton.serving.arrays import Arrays
from lepton.serving.together import Together


class Net:
    """Adds ten to every row; remembers how many rows each run had."""

    def __init__(self, most: int = 100, broken: float = -1.0) -> None:
        self.runs: list[int] = []
        self.most = most
        self.broken = broken

    def run(self, rows: Arrays) -> Mapping[str, Any]:
        self.runs.append(rows.count)
        x = rows.columns["x"]
        if (x == self.broken).any():
            raise RuntimeError("broken")
        return {"y": x + 10, "z": rows.columns["n"][:, None] * 2}

    def is_quick(self, run: Any, count: int) -> bool:
        return count <= self.most

    def at_once(self, run: Any, rows: Arrays) -> Any:
        return run(rows) if rows.count <= self.most else None


def rows(*values: float) -> Arrays:
    x = np.array(values)
    return Arrays({"x": x, "n": (x * 100).astype(np.int64)}, len(x))


KNOWN = rows(7, 8, 9)


def asked(net: Net, *requests: Arrays, runs: Any = None) -> list[Any]:
    """Ask in one turn of a loop."""

    async def scene() -> list[Any]:
        together = Together(net.is_quick, net.at_once)
        for run in {getattr(r, "__self__", r): r for r in runs or [net.run]}.values():
            await together.outputs(run, KNOWN)  # so that it is known
        net.runs.clear()
        each = [together.outputs(runs[i] if runs else net.run, r) for i, r in enumerate(requests)]
        return list(await asyncio.wait_for(asyncio.gather(*each), 10))

    return asyncio.run(scene())


def right(request: Arrays, outputs: Any) -> None:
    np.testing.assert_array_equal(outputs["y"], request.columns["x"] + 10)
    np.testing.assert_array_equal(outputs["z"], request.columns["n"][:, None] * 2)


def test_one_run_and_to_each_its_own_rows() -> None:
    net = Net()
    requests = [rows(1, 2), rows(3), rows(4, 5, 6)]
    for request, outputs in zip(requests, asked(net, *requests), strict=True):
        right(request, outputs)
    assert net.runs == [6]


def test_each_turn_has_its_own_run() -> None:
    net = Net()

    async def scene() -> None:
        together = Together(net.is_quick, net.at_once)
        for value in (1.0, 2.0):
            request = rows(value)
            outputs = await together.outputs(net.run, request)
            right(request, outputs)

    asyncio.run(scene())
    assert net.runs == [1, 1]


@pytest.mark.parametrize("bad", range(5))
def test_a_request_that_breaks_the_model_harms_no_other(bad: int) -> None:
    net = Net(broken=float(bad))
    requests = [rows(float(i)) for i in range(5)]
    answers = asked(net, *requests)
    assert answers[bad] is None
    for i in {0, 1, 2, 3, 4} - {bad}:
        right(requests[i], answers[i])


def test_never_more_rows_in_the_loop_than_are_quick() -> None:
    net = Net(most=4)
    requests = [rows(1, 2, 3), rows(4), rows(5, 6, 7, 8, 9), rows(10, 11)]
    answers = asked(net, *requests)
    assert answers[2] is None  # too many by itself
    for i in (0, 1, 3):
        right(requests[i], answers[i])
    assert net.runs == [4, 2]


def test_versions_are_not_mixed() -> None:
    old, new = Net(), Net()
    requests = [rows(1), rows(2), rows(3)]
    for request, outputs in zip(
        requests, asked(old, *requests, runs=[old.run, new.run, new.run]), strict=True
    ):
        right(request, outputs)
    assert (old.runs, new.runs) == ([1], [3, 2])  # the first one of the latter: to be known


@pytest.mark.parametrize("by_chance", [True, False])
def test_outputs_that_are_not_a_row_each_are_never_cut(by_chance: bool) -> None:
    net = Net()
    prototypes = np.arange(6.0)

    def run(several: Arrays) -> Mapping[str, Any]:
        net.runs.append(several.count)
        return {"prototypes": prototypes} | ({} if by_chance else {"mean": prototypes.mean()})

    async def scene() -> list[Any]:
        together = Together(net.is_quick, net.at_once)
        if by_chance:  # they look like a row each
            await together.outputs(run, rows(1, 2, 3, 4, 5, 6))
        each = [together.outputs(run, r) for r in (rows(1, 2), rows(5), rows(7, 8))]
        return list(await asyncio.wait_for(asyncio.gather(*each), 10))

    answers = asyncio.run(scene())
    assert all(a["prototypes"] is prototypes for a in answers)
    assert net.runs == ([6, 5, 2, 1, 2] if by_chance else [2, 1, 2])


def test_a_model_is_asked_alone_until_it_is_known() -> None:
    net = Net()

    async def scene() -> None:
        together = Together(net.is_quick, net.at_once)
        requests = [rows(1), rows(2, 3), rows(4)]
        each = [together.outputs(net.run, r) for r in requests]
        for request, outputs in zip(requests, await asyncio.gather(*each), strict=True):
            right(request, outputs)
        assert not together.waiting

    asyncio.run(scene())
    assert net.runs == [1, 3]


def test_nobody_is_left_waiting_whatever_goes_wrong() -> None:
    net = Net()

    def is_quick(run: Any, count: int) -> bool:
        raise RuntimeError("oh")

    async def scene() -> list[Any]:
        together = Together(is_quick, net.at_once)
        await together.outputs(net.run, rows(0))
        each = [together.outputs(net.run, rows(i)) for i in (1, 2)]
        return list(await asyncio.wait_for(asyncio.gather(*each), 10))

    assert asyncio.run(scene()) == [None, None]


def test_another_loop_begins_anew() -> None:
    net = Net()
    together = Together(net.is_quick, net.at_once)
    former = asyncio.new_event_loop()
    left = together.outputs(net.run, rows(1))
    former.call_soon(lambda: (left.send(None), former.stop()))
    former.run_forever()  # it ends before the turn does
    left.close()
    former.close()
    right(rows(2), asyncio.run(asyncio.wait_for(together.outputs(net.run, rows(2)), 10)))


def test_who_has_gone_keeps_nobody_waiting() -> None:
    net = Net()

    async def scene() -> None:
        together = Together(net.is_quick, net.at_once)
        gone, stays = (asyncio.ensure_future(together.outputs(net.run, rows(i))) for i in (1, 2))
        await asyncio.sleep(0)
        gone.cancel()
        right(rows(2), await asyncio.wait_for(stays, 10))
        assert gone.cancelled()

    asyncio.run(scene())
