"""What is asked for in one turn of the event loop, answered by one run of the model.

Under load several requests lie ready when the loop looks for them. One run over the rows of all
costs little more than over those of one, and nobody waits longer for it: it comes when the last of
them has been read. Each gets its own rows of the outputs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from lepton.serving.arrays import Arrays, joined

log = logging.getLogger("lepton")

Outputs = Mapping[str, np.ndarray[Any, Any]]
Run = Callable[[Any], Outputs]


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    run: Run
    rows: Arrays
    answer: asyncio.Future[Outputs | None]


class Together:
    """Gathers the requests of one event loop, turn by turn.

    Args:
        at_once: runs a model over rows, or returns None if it is not to be run in the loop.
    """

    def __init__(self, at_once: Callable[[Run, Arrays], Outputs | None]) -> None:
        self._at_once = at_once
        self._asked: list[_Asked] = []

    async def outputs(self, run: Run, rows: Arrays) -> Outputs | None:
        """Return ``run``'s outputs, arrays of shape (rows, …).

        None where it raises or is not to be run here, for these rows alone as well.
        """
        loop = asyncio.get_running_loop()
        one = _Asked(run, rows, loop.create_future())
        if not self._asked:
            loop.call_soon(self._turn)
        self._asked.append(one)
        return await one.answer

    def _turn(self) -> None:
        asked, self._asked = self._asked, []
        for run, those in groupby(asked, key=lambda one: one.run):
            self._answer(run, list(those))

    def _answer(self, run: Run, asked: Sequence[_Asked]) -> None:
        """Run for all of them; where that does not do, for one half after the other."""
        outputs = self._run(run, [one.rows for one in asked])
        if outputs is None and len(asked) > 1:
            half = len(asked) // 2
            self._answer(run, asked[:half])
            self._answer(run, asked[half:])
            return
        at = 0
        for one in asked:
            end = at + one.rows.count
            mine = outputs and {name: values[at:end] for name, values in outputs.items()}
            at = end
            if not one.answer.done():  # who asked may have gone
                one.answer.set_result(mine)

    def _run(self, run: Run, rows: Sequence[Arrays]) -> Outputs | None:
        try:
            if len(rows) == 1:
                return self._at_once(run, rows[0])
            all_rows = joined(rows)
            outputs = self._at_once(run, all_rows)
        except Exception as e:  # noqa: BLE001 - it is raised again where it is told
            log.debug("a model's run over %d requests failed: %r", len(rows), e)
            return None
        if outputs and any(v.shape[:1] != (all_rows.count,) for v in outputs.values()):
            return None  # nobody knows whose what is
        return outputs
