"""Runs the model for requests: at once where it is quick, else together with all that wait.

Nothing waits for a batch to fill: a batch is what came while the one before it ran. A request
that nobody waits for any more (its client left, its time is over) is not run. If a batch fails,
its requests are run one by one, so that only the one that is to blame fails.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa

from lepton.serving.pace import Pace

Outputs = Mapping[str, np.ndarray[Any, Any]]
Run = Callable[[Any], Outputs]
"""Takes rows: an Arrow table, or arrays where it says so."""


TIMED_EVERY = 8
"""Of the runs of a model that is known to be quick, every how many are timed."""


class Overloaded(Exception):  # noqa: N818 - a state of the replica, which the client is told
    """More waits than can be answered in reasonable time.

    Attributes:
        retry_after_s: whole seconds after which to come again.
    """

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(
            f"the replica is overloaded: a request would wait more than {retry_after_s} s; "
            "come again then"
        )
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class Batch:
    """The batch that a request was answered in, as it is told afterwards.

    Attributes:
        began_ns, ended_ns: when the model ran, Unix time; 0 if it was not run in a batch.
        requests: that were run together.
        rows: of them all.
        model_ns: when the model ran for this request, from and to.
    """

    began_ns: int = 0
    ended_ns: int = 0
    requests: int = 0
    rows: int = 0
    model_ns: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    run: Run
    rows: pa.Table
    answer: asyncio.Future[Outputs]
    batch: Batch


class Batcher:
    """Answers requests of one event loop. ``Run`` is called by one thread at a time.

    Args:
        begin: called once in the thread of batches; torch's number of threads is the thread's own.
        told: is told of each batch how many rows it has, in that thread.
    """

    def __init__(
        self, begin: Callable[[], None] = lambda: None, told: Callable[[int], None] | None = None
    ) -> None:
        self._begin = begin
        self._told = told
        self._paces: WeakKeyDictionary[Any, Pace] = WeakKeyDictionary()
        self._waiting: deque[_Waiting] = deque()
        self._at_once = 0
        self._rows = self._requests = 0  # of all that waits or is being run
        self._came = threading.Condition()
        self._stopped = False
        self._thread: threading.Thread | None = None

    @property
    def waiting_rows(self) -> int:
        """Rows that wait or are being run."""
        return self._rows

    @property
    def waiting_requests(self) -> int:
        """Requests that wait or are being run."""
        return self._requests

    def at_once(self, run: Run, rows: Any) -> Outputs | None:
        """Return ``run``'s outputs if nothing waits and it is quick, else None."""
        pace = self._known(run)
        if self._rows or not pace.inline_for(len(rows)):
            return None
        self._at_once += 1
        if pace.is_known and len(rows) <= pace.largest and self._at_once % TIMED_EVERY:
            return run(rows)
        return _timed(run, rows, pace)

    def is_quick(self, run: Run, rows: int = 1) -> bool:
        """Whether so many rows could be answered at once."""
        return self._rows == 0 and self._known(run).inline_for(rows)

    async def answer(
        self,
        run: Run,
        rows: pa.Table,
        patience_s: float | None = None,
        batch: Batch | None = None,
    ) -> Outputs:
        """Return ``run``'s outputs for the rows, arrays of shape (rows, …).

        Args:
            run: of the version that answers.
            rows: of the request.
            patience_s: how long to wait, seconds.
            batch: is told in which batch they were run.

        Raises:
            Overloaded: too much waits already.
            TimeoutError: it took longer than ``patience_s``.
        """
        quick = self.at_once(run, rows)
        if quick is not None:
            return quick
        pace = self._known(run)
        retry_after = pace.retry_after_s(self._rows)
        if retry_after is not None:
            raise Overloaded(retry_after)
        answer: asyncio.Future[Outputs] = asyncio.get_running_loop().create_future()
        one = _Waiting(run, rows, answer, batch or Batch())
        with self._came:
            self._waiting.append(one)
            self._rows += len(rows)
            self._requests += 1
            self._started()
            self._came.notify()
        try:
            async with asyncio.timeout(patience_s):
                return await answer
        except (asyncio.CancelledError, TimeoutError):
            self._leave(one)
            raise

    def close(self) -> None:
        """Answer what waits, then stop."""
        with self._came:
            self._stopped = True
            self._came.notify()
        if self._thread is not None:
            self._thread.join()

    def _leave(self, one: _Waiting) -> None:
        """Give the place of a request that nobody waits for to others, unless it is being run."""
        with self._came, suppress(ValueError):
            self._waiting.remove(one)
            self._rows -= len(one.rows)
            self._requests -= 1

    def _known(self, run: Run) -> Pace:
        """Each version has a pace of its own, which keeps no version in memory."""
        whose = getattr(run, "__self__", run)
        found = self._paces.get(whose)
        if found is None:
            found = self._paces[whose] = Pace()
        return found

    def _started(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True, name="lepton-batches")
            self._thread.start()

    def _work(self) -> None:
        self._begin()
        while self._one_batch():
            pass  # and nothing of a batch is held while there is none

    def _one_batch(self) -> bool:
        """Wait for a batch and run it; return whether there was one."""
        batch = self._next()
        if batch is None:
            return False
        wanted = [one for one in batch if not one.answer.done()]
        began_ns = time.time_ns()
        done = _run_all(wanted, self._known(batch[0].run)) if wanted else []
        together = began_ns, time.time_ns(), len(wanted), sum(len(one.rows) for one in wanted)
        for one in wanted:
            _tell(one.batch, *together)
        if wanted and self._told is not None:
            self._told(together[3])
        with self._came:
            self._rows -= sum(len(one.rows) for one in batch)
            self._requests -= len(batch)
        if done:
            with suppress(RuntimeError):  # the loop has ended, and all who waited with it
                wanted[0].answer.get_loop().call_soon_threadsafe(_deliver, wanted, done)
        return True

    def _next(self) -> list[_Waiting] | None:
        """Wait for requests; take those that one run can answer."""
        with self._came:
            while not self._waiting:
                if self._stopped:
                    return None
                self._came.wait()
            first = self._waiting[0]
            most = self._known(first.run).most_rows
            batch: list[_Waiting] = []
            rows = 0
            while self._waiting and self._waiting[0].run == first.run:
                one = self._waiting[0]
                if batch and rows + len(one.rows) > most:
                    break
                batch.append(self._waiting.popleft())
                rows += len(one.rows)
            return batch


def _tell(batch: Batch, began_ns: int, ended_ns: int, requests: int, rows: int) -> None:
    batch.began_ns, batch.ended_ns, batch.requests, batch.rows = began_ns, ended_ns, requests, rows


def _run_all(batch: Sequence[_Waiting], pace: Pace) -> list[Outputs | Exception]:
    if len(batch) > 1:
        try:
            began_ns = time.time_ns()
            whole = _timed(batch[0].run, pa.concat_tables([one.rows for one in batch]), pace)
            at = began_ns, time.time_ns()
            for one in batch:
                one.batch.model_ns = at
            return list(_cut(whole, [len(one.rows) for one in batch]))
        except Exception:  # noqa: BLE001, S110 - whose fault it is shows when each runs alone
            pass
    return [_alone(one, pace) for one in batch]


def _alone(one: _Waiting, pace: Pace) -> Outputs | Exception:
    began_ns = time.time_ns()
    try:
        return _timed(one.run, one.rows, pace)
    except Exception as e:  # noqa: BLE001 - it is raised again where the request waits
        return e
    finally:
        one.batch.model_ns = began_ns, time.time_ns()


def _timed(run: Run, rows: Any, pace: Pace) -> Outputs:
    began, own = time.perf_counter(), time.thread_time()
    outputs = run(rows)
    own = time.thread_time() - own
    pace.took(len(rows), time.perf_counter() - began, own)
    return outputs


def _cut(outputs: Outputs, counts: Sequence[int]) -> Generator[Outputs]:
    at = 0
    for count in counts:
        yield {name: values[at : at + count] for name, values in outputs.items()}
        at += count


def _deliver(batch: Sequence[_Waiting], done: Sequence[Outputs | Exception]) -> None:
    """In the event loop: wake those who still wait."""
    for one, result in zip(batch, done, strict=True):
        if one.answer.done():
            continue
        if isinstance(result, Exception):
            one.answer.set_exception(result)
        else:
            one.answer.set_result(result)
