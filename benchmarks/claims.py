"""How every benchmark states what it found: claims, each with its value, goal, commit, machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
HERE = Path(__file__).parents[1]
Claim = dict[str, Any]


def claim(
    text: str, value: float | None, goal: float | None, unit: str, sign: int = 1, *, runs: int = 1
) -> Claim:
    """Return one claim; ``sign`` -1 where less is better, a value not measured is None."""
    ok = None if value is None or goal is None else (value - goal) * sign >= 0
    return {"claim": text, "value": value, "goal": goal, "unit": unit, "ok": ok, "runs": runs}


def record(claims: list[Claim], name: str) -> None:
    """Print the claims and write them to ``results/NAME.json``."""
    for one in claims:
        one.update(commit=commit(), machine=machine())
        value = "-" if one["value"] is None else f"{one['value']:.3g}"
        goal = "" if one["goal"] is None else f" (goal {one['goal']:g})"
        mark = {True: "ok", False: "MISSED", None: ""}[one["ok"]]
        print(f"{one['claim']:<66} {value:>8} {one['unit']}{goal} {mark}")
    write(claims, f"{name}.json")


def write(found: Any, name: str) -> None:
    """Write what was measured to ``results/NAME``: text as it is, anything else as JSON."""
    RESULTS.mkdir(exist_ok=True)
    text = found if isinstance(found, str) else json.dumps(found, indent=1) + "\n"
    (RESULTS / name).write_text(text)


def machine() -> str:
    """Say what this ran on, in words."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    python = platform.python_version()
    return f"{platform.system()} {platform.machine()}, {cores} cores, Python {python}"


def commit() -> str:
    """Return the commit that was measured; "+" where files differ from it."""
    ask = ["git", "describe", "--always", "--dirty=+"]
    done = subprocess.run(ask, cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
