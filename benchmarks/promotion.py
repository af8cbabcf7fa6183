"""What a new version costs those who ask: promotions and rollbacks under load, one after another.

``python -m benchmarks.promotion [--quick]`` moves a model's champion back and forth while clients
ask without pause, and reads from their own records when the first answer of the new version came,
how long the slowest request took, and how many failed. Beside it: the same change by a new
``serve.run`` of a plain Ray Serve deployment. Writes ``results/promotion.json``. With
``--large [MEGABYTES]`` it promotes versions of 500 MB instead, each to be loaded first, and
writes ``results/promotion_large.json``.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import lepton
from benchmarks import claims, dots, serving_model
from lepton import cluster
from lepton.registry import Registry
from lepton.serving import App
from lepton.serving.app import leave
from lepton.telemetry import spans_of

CLIENTS = 4
SETTLE_S = 0.5


@dataclass(frozen=True, slots=True)
class Answer:
    """When a request was sent and answered (Unix seconds), by which version, or none."""

    sent: float
    came: float
    version: str | None


@dataclass
class Clients:
    """Ask without pause, each on a connection of its own, all in a process of their own."""

    url: str
    body: bytes
    answers: list[Answer] = field(default_factory=list[Answer])

    def __enter__(self) -> Clients:
        command = [sys.executable, "-m", "benchmarks.promotion_clients", self.url, str(CLIENTS)]
        self._asking = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._reading = threading.Thread(target=self._read)
        self._reading.start()
        told = self._asking.stdin
        assert told is not None
        with told:
            told.write(self.body)
        return self

    def __exit__(self, *_: object) -> None:
        self._asking.terminate()
        self._reading.join()
        self._asking.wait()

    def first_of(self, version: str, since: float, timeout_s: float = 120) -> float:
        """Wait for a version's first answer to a request after ``since``; return when it came."""
        at = 0
        while time.time() < since + timeout_s:
            while at < len(self.answers):
                answer = self.answers[at]
                at += 1
                if answer.came > since and answer.version == version:
                    return answer.came
            time.sleep(0.001)
        raise SystemExit(
            f"version {version} never answered at {self.url}; last: {self.answers[-1]}"
        )

    def _read(self) -> None:
        answers = self._asking.stdout
        assert answers is not None
        with answers:
            for line in answers:
                sent, came, version = line.decode().rstrip("\n").split(" ")
                self.answers.append(Answer(float(sent), float(came), version or None))


@dataclass(frozen=True)
class Moves:
    """What the moves of one kind cost.

    Attributes:
        seconds: from asking for each move to the first answer of the new version.
        published: the same from the commit that moves the pointer, where there is one.
        worst_ms: the slowest request that was under way in each move.
        p99_ms: of requests before the first move.
        failed: requests.
        requests: all of them.
    """

    seconds: list[float]
    published: list[float]
    worst_ms: list[float]
    p99_ms: float
    failed: int
    requests: int


def moved(
    clients: Clients,
    moves: list[tuple[str, Callable[[], object]]],
    commit: Callable[[], float] | None = None,
) -> Moves:
    """Make the moves, each to the version that is named with it, while the clients ask.

    ``commit`` returns when the newest move was committed.
    """
    with clients:
        time.sleep(3)
        quiet = sorted((a.came - a.sent) * 1e3 for a in list(clients.answers)[50:])
        seconds: list[float] = []
        published: list[float] = []
        worst: list[float] = []
        for version, move in moves:
            began = time.time()
            mover = threading.Thread(target=move)
            mover.start()
            first = clients.first_of(version, began)
            mover.join()
            time.sleep(SETTLE_S)
            seconds.append(first - began)
            if commit is not None:
                published.append(first - commit())
            around = [a for a in list(clients.answers) if a.came > began and a.sent < first + 0.1]
            worst.append(max((a.came - a.sent) * 1e3 for a in around))
    failed = sum(a.version is None for a in clients.answers)
    return Moves(
        seconds, published, worst, quiet[int(len(quiet) * 0.99)], failed, len(clients.answers)
    )


def with_lepton(app: App, home: str, body: bytes, count: int) -> Moves:
    """Promote version 2 and roll back to version 1, in turn.

    Version 2 has to be loaded each time; its graph is that of version 1, and in memory.
    """

    def forth() -> object:
        return lepton.promote(serving_model.MODEL, 2, home=home)

    def back() -> object:
        return lepton.rollback(serving_model.MODEL, home=home)

    registry = Registry(f"{home}/registry")
    moves = [("2", forth) if i % 2 == 0 else ("1", back) for i in range(count)]
    return moved(
        Clients(app.infer_url, body),
        moves,
        lambda: registry.history(serving_model.MODEL)[-1].time.timestamp(),
    )


def with_serve(folder: Path, port: int, body: bytes, count: int) -> Moves:
    """Change a plain Ray Serve deployment's version by running it anew."""
    from benchmarks.promotion_peer import run

    run(folder, "1")
    moves = [("2" if i % 2 == 0 else "1") for i in range(count)]
    clients = Clients(f"http://127.0.0.1:{port}/plain/infer", body)
    return moved(clients, [(v, lambda v=v: run(folder, v)) for v in moves])


def state(mine: Moves, theirs: Moves) -> list[claims.Claim]:
    """Return the claims."""
    runs, again = len(mine.seconds), len(theirs.seconds)
    middle = statistics.median
    ratio = max(mine.worst_ms) / mine.p99_ms
    claim = claims.claim
    told: list[claims.Claim] = []
    for kind, first in (("promoted", 0), ("rolled back", 1)):
        published, asked = mine.published[first::2], mine.seconds[first::2]
        count = len(asked)
        what = f"{kind}: published -> first answer"
        told += [
            claim(f"{what}, median", middle(published), 0.1, "s", -1, runs=count),
            claim(f"{what}, worst", max(published), None, "s", -1, runs=count),
            claim(f"{kind}: asked -> first answer, median", middle(asked), None, "s", runs=count),
            claim(f"{kind}: asked -> first answer, worst", max(asked), None, "s", runs=count),
        ]
    return [
        *told,
        claim("slowest request of all moves over p99 before", ratio, 10, "times", -1, runs=runs),
        claim("slowest request, median of the moves", middle(mine.worst_ms), None, "ms", runs=runs),
        claim("p99 before", mine.p99_ms, None, "ms", runs=runs),
        claim("failed requests", mine.failed, 0, "requests", -1, runs=runs),
        claim("requests", mine.requests, None, "requests", runs=runs),
        claim("serve.run: first new answer, median", middle(theirs.seconds), None, "s", runs=again),
        claim("serve.run: slowest request", max(theirs.worst_ms), None, "ms", runs=again),
        claim("serve.run: failed requests", theirs.failed, None, "requests", runs=again),
    ]


def picture(mine: Moves, theirs: Moves) -> None:
    """Draw every move."""
    both = {"lepton": mine, "serve.run": theirs}
    shown = {
        "asked for -> first new answer": {who: of.seconds for who, of in both.items()},
        "published -> first new answer": {"lepton": mine.published},
        "slowest request of the move": {
            who: [ms / 1e3 for ms in of.worst_ms] for who, of in both.items()
        },
    }
    dots.draw(shown, claims.RESULTS / "promotion.png", "seconds")


@dataclass(frozen=True, slots=True)
class Memory:
    """What a replica keeps of its own, without what it shares with the file cache, in bytes."""

    before: int
    most: int


class MemoryWatch:
    """Looks at a process's own memory a hundred times a second."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._before = self._most = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def found(self) -> Memory:
        """What was seen so far."""
        return Memory(self._before, self._most)

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self._most = max(self._most, self._now())

    def _now(self) -> int:
        told = Path(f"/proc/{self._pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in told.splitlines() if ":" in line)
        return int(fields["RssAnon"].split()[0]) * 1024


def large(folder: Path, megabytes: int, count: int) -> list[claims.Claim]:
    """Promote versions of so many megabytes, one after another, each to be loaded anew."""
    home = str(folder)
    made = serving_model.make_heavy(folder, 3, megabytes)
    body = serving_model.bodies(folder)["1 row, JSON"][0]
    app = lepton.promote(made[0], home=home, port=cluster.free_ports(1)[0])
    (told,) = app.replicas()
    registry = Registry(f"{home}/registry")
    order = [str((i + 1) % 3 + 1) for i in range(count)]  # the next one is never in memory
    moves: list[tuple[str, Callable[[], object]]] = [
        (v, lambda v=v: lepton.promote(serving_model.MODEL, int(v), home=home)) for v in order
    ]
    with MemoryWatch(told["pid"]) as watch:
        mine = moved(
            Clients(app.infer_url, body),
            moves,
            lambda: registry.history(serving_model.MODEL)[-1].time.timestamp(),
        )
    app.flush()
    spans = [s for s in spans_of(f"{home}/traces") if s.name == "lepton.model.load"]
    loads = [(s.end_ns - s.start_ns) / 1e9 for s in spans][-count:]
    if len(loads) < count:
        raise SystemExit(f"{len(loads)} loads are recorded for {count} promotions")
    beyond = [p - took for p, took in zip(mine.published, loads, strict=True)]
    size = megabytes * 2**20
    grown = (watch.found.most - watch.found.before) / size
    middle, claim = statistics.median, claims.claim
    of = f"{megabytes} MB"
    return [
        claim(f"{of}: load and checks, median", middle(loads), None, "s", runs=count),
        claim(f"{of}: published -> new answer", middle(mine.published), None, "s", runs=count),
        claim(f"{of}: of that beyond the load", middle(beyond), 0.2, "s", -1, runs=count),
        claim(f"{of}: of that beyond the load, worst", max(beyond), None, "s", runs=count),
        claim(f"{of}: p99 before", mine.p99_ms, None, "ms", runs=count),
        claim(f"{of}: slowest request, worst", max(mine.worst_ms), None, "ms", runs=count),
        claim(
            f"{of}: slowest request over p99 before",
            max(mine.worst_ms) / mine.p99_ms,
            10,
            "times",
            -1,
            runs=count,
        ),
        claim(f"{of}: slowest request, median", middle(mine.worst_ms), None, "ms", runs=count),
        claim(f"{of}: most memory beside one version", grown, None, "times its size", runs=count),
        claim(f"{of}: failed requests", mine.failed, 0, "requests", -1, runs=count),
        claim(f"{of}: requests", mine.requests, None, "requests", runs=count),
    ]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--large", nargs="?", type=int, const=500, metavar="MEGABYTES")
    args = parser.parse_args()
    if args.large:
        with tempfile.TemporaryDirectory(prefix="lepheavy") as scratch:
            found = large(Path(scratch), args.large, 3 if args.quick else 9)
            leave()
            cluster.disconnect()
        claims.record(found, "promotion_large")
        return
    with tempfile.TemporaryDirectory(prefix="leppromote") as scratch:
        folder = Path(scratch)
        made = serving_model.make(folder, versions=2)
        serving_model.save_weights(folder)
        body = serving_model.bodies(folder)["1 row, JSON"][0]
        port = cluster.free_ports(1)[0]
        app = lepton.promote(made[0], home=str(folder), port=port)
        mine = with_lepton(app, str(folder), body, 10 if args.quick else 100)
        theirs = with_serve(folder, port, body, 2 if args.quick else 6)
        leave()
        cluster.disconnect()
    claims.record(state(mine, theirs), "promotion")
    picture(mine, theirs)


if __name__ == "__main__":
    main()
