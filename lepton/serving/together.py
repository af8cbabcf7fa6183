"""What is asked for in one turn of the event loop, answered by one run of the model.

Under load several requests lie ready when the loop looks for them. One run over the rows of all
costs little more than over those of one. It comes when the last of them has been read, and each
gets its own rows of the outputs. That takes outputs that are a row for each row: a model is asked
alone until it has shown that, and for good when it shows something else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from lepton.serving.arrays import Arrays, joined
from lepton.serving.inputs import MAX_ROWS

log = logging.getLogger("lepton")

Outputs = Mapping[str, np.ndarray[Any, Any]]
Run = Callable[[Any], Outputs]


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    run: Run
    rows: Arrays
    answer: asyncio.Future[Outputs | None]

    def tell(self, outputs: Outputs | None) -> None:
        if not self.answer.done():  # who asked may have gone
            self.answer.set_result(outputs)


class Together:
    """Gathers the requests of an event loop, turn by turn.

    Args:
        is_quick: whether a model may be run over so many rows in the loop.
        at_once: runs it, or returns None if that is not so.
    """

    def __init__(
        self,
        is_quick: Callable[[Run, int], bool],
        at_once: Callable[[Run, Arrays], Outputs | None],
    ) -> None:
        self._is_quick = is_quick
        self._at_once = at_once
        self._asked: list[_Asked] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._by_row: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()

    @property
    def waiting(self) -> bool:
        """Whether anybody waits for this turn's run."""
        return bool(self._asked)

    async def outputs(self, run: Run, rows: Arrays) -> Outputs | None:
        """Return ``run``'s outputs, arrays of shape (rows, …).

        None where it raises or is not to be run here, for these rows alone as well.
        """
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # the former one ended, and nobody waits any more
            self._loop, self._asked = loop, []
        one = _Asked(run, rows, loop.create_future())
        if not self._asked:
            loop.call_soon(self._turn)
        self._asked.append(one)
        return await one.answer

    def _turn(self) -> None:
        asked, self._asked = self._asked, []
        try:
            here = (one for one in asked if not one.answer.done())
            for run, those in groupby(here, key=lambda one: one.run):
                for several in self._packed(run, list(those)):
                    self._answer(run, several)
        finally:
            for one in asked:
                one.tell(None)

    def _packed(self, run: Run, asked: Sequence[_Asked]) -> Iterator[Sequence[_Asked]]:
        """Yield those that one run may answer."""
        if not self._by_row.get(_whose(run), False):
            yield asked[:1]
            asked = asked[1:]
            if not self._by_row.get(_whose(run), False):
                yield from ([one] for one in asked)
                return
        count = sum([one.rows.count for one in asked])
        if len(asked) == 1 or (count <= MAX_ROWS and self._is_quick(run, count)):
            yield asked
            return
        several: list[_Asked] = []
        count = 0
        for one in asked:
            count += one.rows.count
            if several and (count > MAX_ROWS or not self._is_quick(run, count)):
                yield several
                several, count = [], one.rows.count
            several.append(one)
        yield several

    def _answer(self, run: Run, asked: Sequence[_Asked]) -> None:
        """Run for all of them; where that fails, for one half after the other."""
        if not asked:
            return
        if len(asked) == 1:
            asked[0].tell(self._run(run, asked[0].rows))
            return
        outputs = self._run(run, joined([one.rows for one in asked]))
        if not self._by_row[_whose(run)]:
            for one in asked:
                self._answer(run, [one])
            return
        if outputs is None:
            half = len(asked) // 2
            self._answer(run, asked[:half])
            self._answer(run, asked[half:])
            return
        at = 0
        for one in asked:
            end = at + one.rows.count
            one.tell({name: values[at:end] for name, values in outputs.items()})
            at = end

    def _run(self, run: Run, rows: Arrays) -> Outputs | None:
        """Run, and learn whether the outputs are a row for each row."""
        try:
            outputs = self._at_once(run, rows)
        except Exception as e:  # noqa: BLE001 - it is raised again where it is told
            log.debug("a model's run over %d rows failed: %r", rows.count, e)
            return None
        if outputs is not None:
            rowwise = all(v.shape[:1] == (rows.count,) for v in outputs.values())
            if not rowwise or _whose(run) not in self._by_row:
                self._by_row[_whose(run)] = rowwise
        return outputs


def _whose(run: Run) -> Any:
    """What a method is of: each access makes another object of a method."""
    return getattr(run, "__self__", run)
