"""What telemetry costs: a training step, a request, and the longest wait of a caller.

Each measurement is a process of its own (``telemetry_once.py``). "Off" is ``OTEL_SDK_DISABLED``,
"files" what a person gets who asks for nothing, "on" all three signals by OTLP to a collector on
this machine. Rounds are interleaved, and "off" is measured twice in each: how far those two differ
is the noise, which is larger than the costs. So these are told twice: as the difference of CPU time
between whole processes, and as the CPU time of what telemetry does: its calls, and its threads by
the kernel's count. Goals are for the latter.
A request has a ``traceparent`` in its answer and a trace id in the inference log with telemetry
off, too: what that takes is told with the rest, and once more without it.
Waits of callers are told with and without the time in which a thread could run and got no
processor, which is other work of this machine; the goal is for what is left.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from benchmarks import claims, telemetry_load

STEPS, REQUESTS, BLOCK_S = 4000, 12_000, 4
LOADED, CYCLES = 2, 100
"""Processes under load for one round of the others, and how often the arms of each take turns."""
PACE = 1000
"""Steps a second at which a step's cost is to be small."""

Found = dict[str, list[dict[str, Any]]]


def once(way: str, *given: object, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run one measurement."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "RAY_ADDRESS"))}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.telemetry_once", way, *map(str, given)],
        cwd=claims.HERE,
        env={**clean, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=300,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def listening(way: str) -> Generator[str]:
    """Run a collector, or what only accepts connections; yield its address."""
    command = [sys.executable, "-m", "benchmarks.telemetry_once", way]
    process = subprocess.Popen(command, cwd=claims.HERE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


def _asked_for(url: str) -> dict[str, dict[str, str]]:
    """Return the environments that are measured, for a collector at an address."""
    on = {"OTEL_EXPORTER_OTLP_ENDPOINT": url}
    return {"off": {"OTEL_SDK_DISABLED": "true"}, "files": {}, "on": on}


def loaded(rounds: int) -> list[claims.Claim]:
    """Measure requests under load alone, and return what that means."""
    with tempfile.TemporaryDirectory(prefix="lepton-telemetry-") as folder:
        once("home", folder)
        with listening("collector") as url:
            found = telemetry_load.measure(folder, _asked_for(url), LOADED * rounds, CYCLES)
    return telemetry_load.claims_of(found, _SETTINGS, 2)


def measure(rounds: int, *, served: bool) -> dict[str, Any]:
    """Return everything that was measured."""
    with tempfile.TemporaryDirectory(prefix="lepton-telemetry-") as folder:
        once("home", folder)
        with listening("collector") as url:
            off = _asked_for(url)["off"]
            settings = {**_asked_for(url), "control": off}
            found: dict[str, Any] = {"steps": {}, "requests": {}}
            for way, count in (("steps", STEPS), ("requests", REQUESTS)):
                kept: Found = {name: [] for name in settings}
                for _ in range(rounds):
                    for name, environment in settings.items():
                        kept[name].append(once(way, folder, count, environment=environment))
                        print(way, name, kept[name][-1], file=sys.stderr)
                found[way] = kept
            if served:
                found["load"] = telemetry_load.measure(
                    folder, _asked_for(url), LOADED * rounds, CYCLES
                )
                mark = {"LEPTON_BENCH": f"{os.getpid()}"}
                found["served"] = once("served", folder, 2000, environment={**off, **mark})
                print("served", found["served"], file=sys.stderr)
        with listening("deaf") as url:
            deaf = {"OTEL_EXPORTER_OTLP_ENDPOINT": url}
            closed = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
            settings = {"control": {}, "closed": closed, "deaf": deaf}
            for way, count in (("block", BLOCK_S), ("steps", STEPS), ("requests", REQUESTS)):
                kept = found.setdefault(way, {})
                ours = [name for name in settings if name != "control" or way == "block"]
                kept.update({name: [] for name in ours})
                for _ in range(max(1, rounds // (2 if way == "block" else 4))):
                    for name in ours:
                        kept[name].append(once(way, folder, count, environment=settings[name]))
                        print(way, name, kept[name][-1], file=sys.stderr)
    return found


def _extra(found: Found, name: str) -> list[float]:
    """CPU seconds that a setting adds to "off", round by round."""
    return [a["cpu"] - b["cpu"] for a, b in zip(found[name], found["off"], strict=True)]


def _counted(found: Found, name: str) -> float:
    """Median of the CPU seconds that telemetry's calls and threads took."""
    return statistics.median(s["calls"] + s["threads"] for s in found[name])


def claims_of(found: dict[str, Any]) -> list[claims.Claim]:
    """Return what it means."""
    made: list[claims.Claim] = []

    def add(text: str, value: float | None, goal: float | None, unit: str, runs: int) -> None:
        made.append(claims.claim(text, value, goal, unit, -1, runs=runs))

    steps, requests = found["steps"], found["requests"]
    rounds = len(steps["off"])
    median = statistics.median
    add("step, telemetry off", 1e3 * median(s["wall"] for s in steps["off"]), None, "ms", rounds)
    for name in ("files", "on"):
        text = f"training at {PACE} steps/s: {_SETTINGS[name]}"
        add(text, 100 * PACE * _counted(steps, name), 1, "%", rounds)
    for name in ("files", "on", "control"):
        text = f"training at {PACE} steps/s, process against process: {_SETTINGS[name]}"
        add(text, 100 * PACE * median(_extra(steps, name)), None, "%", rounds)
    cpu = 1e6 * median(s["cpu"] for s in requests["off"])
    add("request in the replica's process, no network, telemetry off", cpu, None, "us CPU", rounds)
    for name in ("files", "on"):
        add(f"request: {_SETTINGS[name]}", 1e6 * _counted(requests, name), None, "us CPU", rounds)
    for name in ("files", "on", "control"):
        text = f"request, process against process: {_SETTINGS[name]}"
        add(text, 1e6 * median(_extra(requests, name)), None, "us CPU", rounds)
    whole = found.get("served", {}).get("cpu")
    add("request through Ray Serve, replica's process", whole and whole * 1e6, None, "us CPU", 1)
    for name in ("files", "on"):
        share = 100 * _counted(requests, name) / whole if whole else None
        add(f"requests/s of a replica in Ray Serve: {_SETTINGS[name]}", share, 2, "%", rounds)
        beyond = _counted(requests, name) - _counted(requests, "off")
        share = 100 * beyond / whole if whole else None
        text = f"the same, beyond what is done with telemetry off: {_SETTINGS[name]}"
        add(text, share, 2, "%", rounds)
    for name in ("closed", "deaf"):
        runs = len(steps[name])
        text = f"training at {PACE} steps/s: {_COLLECTORS[name]}"
        add(text, 100 * PACE * _counted(steps, name), 1, "%", runs)
        more = _counted(requests, name) - _counted(requests, "on")
        share = 100 * more / whole if whole else None
        text = f"requests/s of a replica: {_COLLECTORS[name]}, beyond one that takes everything"
        add(text, share, 1, "%", runs)
    made += telemetry_load.claims_of(found.get("load", {}), _SETTINGS, 2)
    spans = sum(r["unsampled_spans"] for r in (*requests["on"], *requests["files"]))
    asked = f"spans of {2 * rounds * REQUESTS // 5} requests the client did not sample"
    add(asked, spans, 0, "spans", 2 * rounds)
    return [*made, *_blocks(found["block"])]


def _blocks(block: Found) -> list[claims.Claim]:
    made: list[claims.Claim] = []
    for name, text in _COLLECTORS.items():
        runs = block[name]
        goal = None if name == "control" else 10
        for key, what in (
            ("without_gc", "longest call, without garbage collections"),
            ("max", "longest call, with them"),
            ("blocked", "longest call, with them, without waits for a processor"),
            ("p999", "longest of a thousand calls"),
        ):
            worst = max(r[key] for r in runs) * 1e3
            limit = goal if key == "blocked" else None
            made.append(claims.claim(f"{text}: {what}", worst, limit, "ms", -1, runs=len(runs)))
        end = max(r["end"] for r in runs)
        late = None if name == "control" else 2.1
        made.append(claims.claim(f"{text}: a process's end", end, late, "s", -1, runs=len(runs)))
    return made


_SETTINGS = {
    "files": "span files alone",
    "on": "traces, metrics and logs by OTLP",
    "control": "off against off, the noise",
}
_COLLECTORS = {
    "control": "no collector asked for",
    "closed": "collector's port closed",
    "deaf": "collector never answers",
}


def main() -> None:
    """Run everything and write it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round, without Ray Serve")
    parser.add_argument(
        "--load", action="store_true", help="requests under load alone, to telemetry_load.json"
    )
    given = parser.parse_args()
    if given.load:
        claims.record(loaded(given.rounds), "telemetry_load")
        return
    found = measure(1 if given.quick else given.rounds, served=not given.quick)
    claims.record(claims_of(found), "telemetry")


if __name__ == "__main__":
    main()
