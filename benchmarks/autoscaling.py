"""How soon a service grows when many ask at once, and whether anybody is the worse for it.

``python -m benchmarks.autoscaling [--quick]`` serves a model with one to two replicas. ``wrk`` then
asks without pause while a client beside it notes, twenty times a second, which replica answered. It
is read off when the second replica was asked for, when it first answered, how many requests failed,
and when it was gone again. Writes ``results/autoscaling.json``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from ray import serve  # noqa: TID251 - what it decides is what is measured

import lepton
from benchmarks import claims, dots, serving_model
from lepton import cluster
from lepton.serving import App, Service
from lepton.serving.app import leave

CONNECTIONS = 16
LOOK_S = 0.05
SHRINK_S = 5.0
LONGEST_S = 90.0
SCRIPT = Path(__file__).parent / "load.lua"


@dataclass
class Watch:
    """Asks and looks, and notes the seconds (of the monotonic clock) at which things were first so.

    Attributes:
        decided: more than one replica is asked for.
        answered: the first answer of a second replica.
        alone: of the newest look, only one replica is left.
    """

    app: App
    body: bytes
    decided: float | None = None
    answered: float | None = None
    alone: bool = True
    failed: int = 0
    asked: int = 0
    _seen: set[str] = field(default_factory=set[str])
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Watch:
        self._threads = [threading.Thread(target=t) for t in (self._ask, self._look)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        with httpx.Client(timeout=60) as http:
            while not self._stop.wait(LOOK_S):
                self.asked += 1
                try:
                    reply = http.post(self.app.infer_url, content=self.body)
                except httpx.HTTPError:
                    self.failed += 1
                    continue
                self.failed += reply.status_code != 200
                self._seen.add(reply.headers.get("x-lepton-replica", ""))
                if len(self._seen) > 1 and self.answered is None:
                    self.answered = time.monotonic()

    def _look(self) -> None:
        while not self._stop.wait(LOOK_S):
            found = serve.status().applications[f"lepton-{self.app.model}"].deployments["replica"]
            states = {str(getattr(s, "value", s)): n for s, n in found.replica_states.items()}
            self.alone = sum(states.values()) == states.get("RUNNING", 0) == 1
            if sum(states.values()) > 1 and self.decided is None:
                self.decided = time.monotonic()


@dataclass(frozen=True)
class Step:
    """One step of load: seconds from its beginning, or from its end, and counts."""

    decided_s: float
    answered_s: float
    alone_s: float
    failed: int
    requests: int


def step(app: App, body: bytes, load_s: int, folder: Path) -> Step:
    """Load the service, stop, and wait until it is as small as before."""
    with Watch(app, body) as watch:
        began = time.monotonic()
        requests, failed = loaded(app, body, load_s, folder)
        ended = time.monotonic()
        while not watch.alone:
            if time.monotonic() - ended > LONGEST_S:
                raise SystemExit(f"the second replica is still there after {LONGEST_S:.0f} s")
            time.sleep(LOOK_S)
        alone_s = time.monotonic() - ended
    if watch.decided is None or watch.answered is None:
        raise SystemExit(f"no second replica in {load_s} s of load: the clients are too slow")
    return Step(
        watch.decided - began,
        watch.answered - began,
        alone_s,
        watch.failed + failed,
        watch.asked + requests,
    )


def loaded(app: App, body: bytes, load_s: int, folder: Path) -> tuple[int, int]:
    """Ask by wrk; return how many requests there were and how many failed."""
    (folder / "body").write_bytes(body)
    env = {**os.environ, "BODY": str(folder / "body"), "HEADERS": "Content-Type: application/json"}
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{load_s}s", "--timeout", "30s", "-s"]
    done = subprocess.run(
        [*command, str(SCRIPT), app.infer_url], env=env, capture_output=True, text=True, check=True
    )
    told = next(line for line in done.stdout.splitlines() if line.startswith("RESULT")).split()
    return int(told[1]), int(told[3]) + int(told[4])


def state(steps: list[Step]) -> list[claims.Claim]:
    """Return the claims."""
    runs, middle, claim = len(steps), statistics.median, claims.claim
    decided = [s.decided_s for s in steps]
    return [
        claim("load -> second replica asked for, median", middle(decided), 2.5, "s", -1, runs=runs),
        claim("load -> second replica asked for, worst", max(decided), None, "s", runs=runs),
        claim(
            "load -> second replica answers, median",
            middle([s.answered_s for s in steps]),
            None,
            "s",
            runs=runs,
        ),
        claim(
            f"load ends -> one replica again, with shrink_after_s={SHRINK_S:g}, median",
            middle([s.alone_s for s in steps]),
            None,
            "s",
            runs=runs,
        ),
        claim("failed requests", sum(s.failed for s in steps), 0, "requests", -1, runs=runs),
        claim("requests", sum(s.requests for s in steps), None, "requests", runs=runs),
    ]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    if shutil.which("wrk") is None:
        raise SystemExit("install wrk: apt-get install wrk")
    with tempfile.TemporaryDirectory(prefix="lepscale") as scratch:
        folder = Path(scratch)
        (model,) = serving_model.make(folder)
        body = serving_model.bodies(folder)["1 row, JSON"][0]
        service = Service(shrink_after_s=SHRINK_S)
        app = lepton.promote(
            model,
            home=str(folder),
            replicas=(1, 2),
            port=cluster.free_ports(1)[0],
            service=service,
        )
        steps = [step(app, body, 25 if quick else 40, folder) for _ in range(1 if quick else 5)]
        leave()
        cluster.disconnect()
    claims.record(state(steps), "autoscaling")
    shown = {
        "load -> second replica asked for": {"lepton": [s.decided_s for s in steps]},
        "load -> second replica answers": {"lepton": [s.answered_s for s in steps]},
        "load ends -> one replica again": {"lepton": [s.alone_s for s in steps]},
    }
    dots.draw(shown, claims.RESULTS / "autoscaling.png", "seconds")


if __name__ == "__main__":
    main()
