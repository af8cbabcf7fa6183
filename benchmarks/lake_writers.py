"""Writers that go on until they are killed, and what their table must hold at any moment.

Each writer is a process with steps 1, 2, 3 and so on; a step is one commit with the transaction
(its name, the step). So the rows that a version must hold follow from the transactions it holds:
no step is half there, lost, or there twice. ``python -m benchmarks.lake_writers URI NAME OPTIONS``
runs one of them; what it does follows from its name.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable

import lepton
from lepton.errors import LakeError, WriteConflict
from lepton.lake.maintenance import optimize

HERE = Path(__file__).parents[1]
PER_STEP = 3
PAUSE, REMOTE_PAUSE = 0.05, 0.3
SCHEMA = pa.schema({"name": pa.string(), "key": pa.int64(), "value": pa.int64()})
Row = tuple[str, int, int]


def rows_after(name: str, step: int) -> list[Row]:
    """Return the rows of a writer, (name, key, value), after a step; none after step 0."""
    if name.startswith("append"):
        return [(name, key, 1 + key // PER_STEP) for key in range(PER_STEP * step)]
    if name.startswith("merge"):  # step n writes keys n - 1 and n
        return [(name, key, min(key + 1, step)) for key in range(step + 1)] if step else []
    if name.startswith("swap"):  # each step replaces all
        return [(name, key, step) for key in range(PER_STEP)] if step else []
    return []


def main() -> None:
    """Write until killed; the last steps that are there already are written once more."""
    uri, name, text = sys.argv[1:4]
    options: dict[str, str] = json.loads(text)
    print("ready", flush=True)
    sys.stdin.readline()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    step = max(1, reached(uri, name, options) - 1)
    while True:
        try:
            _step(uri, name, step, options)
        except WriteConflict:  # another writer was first: the same step again
            continue
        step += 1
        if not name.startswith("merge"):  # a merge goes with no other commit: leave it a gap
            time.sleep(REMOTE_PAUSE if "://" in uri else PAUSE)


def _end_with_parent() -> None:
    sys.stdin.read()  # ends when the pipe does, however the parent came to its end
    os._exit(1)


def _step(uri: str, name: str, step: int, options: dict[str, str]) -> None:
    if name.startswith("optimize"):
        with suppress(LakeError):  # another writer was first
            optimize(uri, storage_options=options)
        return
    how: dict[str, Any] = {}
    new = [r for r in rows_after(name, step) if r not in set(rows_after(name, step - 1))]
    if name.startswith("merge"):
        how = {"mode": "merge", "key": ["name", "key"]}
    elif name.startswith("swap") and step > 1:
        how = {"mode": "replace_where", "where": f"name = '{name}'"}
    lepton.write(_table(new), uri, txn=(name, step), storage_options=options, **how)


def _table(rows: Sequence[Row]) -> pa.Table:
    names, keys, values = zip(*rows, strict=True)
    return pa.table({"name": names, "key": keys, "value": values})


def reached(uri: str, name: str, options: Mapping[str, str], version: int | None = None) -> int:
    """Return the last step of a writer that a table holds."""
    opened = DeltaTable(uri, version=version, storage_options=dict(options) or None)
    return opened.transaction_version(name) or 0


class Crowd:
    """Writers at work on one table; a context: they end with it.

    Attributes:
        names: the writers.
    """

    def __init__(self, uri: str, names: Sequence[str], options: Mapping[str, str]) -> None:
        """Name the table, its writers and the storage options; nothing runs yet."""
        self.names = list(names)
        self._uri = uri
        self._options = dict(options)
        self._running: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Crowd:
        """Make the table, with a checkpoint every few commits, and start the writers."""
        often = {"delta.checkpointInterval": "5"}
        stored = self._options or None
        DeltaTable.create(self._uri, SCHEMA, configuration=often, storage_options=stored)
        try:
            for name in self.names:
                self._start(name)
            for name in self.names:
                self._go(name)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        """Kill what still runs."""
        for name in list(self._running):
            self._end(name)

    def kill(self, name: str) -> None:
        """Kill a writer where it stands and start it once more.

        Raises:
            AssertionError: it had ended by itself.
        """
        process = self._running[name]
        assert process.poll() is None, f"{name} ended by itself"
        self._end(name)
        self._start(name)
        self._go(name)

    def finish(self, steps: Mapping[str, int], seconds: float = 120) -> None:
        """End all writers; then let each, alone, come to its step.

        Alone, as a merge goes with no other commit: others could keep it waiting for ever.

        Raises:
            TimeoutError: a writer does not come to its step.
        """
        self.__exit__(None, None, None)
        for name, step in steps.items():
            self._start(name)
            self._go(name)
            end = time.monotonic() + seconds
            while reached(self._uri, name, self._options) < step:
                assert self._running[name].poll() is None, f"{name} ended by itself"
                if time.monotonic() > end:
                    raise TimeoutError(f"{name} does not come to step {step}")
                time.sleep(0.05)
            self._end(name)

    def steps(self) -> dict[str, int]:
        """Check the newest version and return the steps that it holds.

        Raises:
            AssertionError: it holds other rows than those of its transactions.
        """
        table = lepton.table(self._uri, storage_options=self._options)
        steps = {n: reached(self._uri, n, self._options, table.version) for n in self.names}
        wanted = sorted(row for n, step in steps.items() for row in rows_after(n, step))
        rows = table.to_arrow().select(["name", "key", "value"])
        found = sorted(zip(*(c.to_pylist() for c in rows.columns), strict=True))
        assert found == wanted, _difference(found, wanted)
        assert table.count_rows() == len(wanted)
        return steps

    def _start(self, name: str) -> None:
        self._running[name] = subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.lake_writers"),
                *(self._uri, name, json.dumps(self._options)),
            ],
            cwd=HERE,
            env={**os.environ, "PYTHONPATH": str(HERE)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _end(self, name: str) -> None:
        process = self._running.pop(name)
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()

    def _go(self, name: str) -> None:
        process = self._running[name]
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("go\n")
        process.stdin.flush()


def _difference(found: Sequence[Row], wanted: Sequence[Row]) -> str:
    more = [r for r in found if r not in set(wanted)][:5]
    less = [r for r in wanted if r not in set(found)][:5]
    return f"{len(found)} rows, not {len(wanted)}; too many such as {more}, too few such as {less}"


def kill_at_random(crowd: Crowd, rounds: int, chance: random.Random, most: float) -> dict[str, int]:
    """Kill one writer a round, at a random moment; check after each and return the last steps."""
    steps = crowd.steps()
    for _ in range(rounds):
        time.sleep(chance.uniform(0, most))  # where it stands then is the test's point
        crowd.kill(chance.choice(crowd.names))
        now = crowd.steps()
        assert all(now[n] >= steps[n] for n in crowd.names), (steps, now)
        steps = now
    return steps


if __name__ == "__main__":
    main()
