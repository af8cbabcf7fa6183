"""Which Delta tables are read right, and by whom: ``python -m benchmarks.conformance``.

Every reader answers the same cases in a process of its own. An answer is right, refused (an error
that says what is not supported), different (no error, and other rows: the worst), or an error.
Values are compared, not types: an int32 for an int64 or a timestamp without its zone is right.

Results: ``benchmarks/results/conformance.json`` (the claims), ``conformance_matrix.json`` (every
answer) and ``conformance.md`` (the table by feature).
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.claims import HERE, Claim, claim, record, write
from benchmarks.conformance_once import anywhere
from benchmarks.conformance_readers import READERS
from benchmarks.conformance_tables import GROUPS, Case, cases

Answers = dict[str, dict[str, dict[str, str]]]
MARKS = {
    "right": "[green]right[/]",
    "refused": "[yellow]refused[/]",
    "different": "[bold red]DIFFERENT[/]",
    "error": "[magenta]error[/]",
    "crashed": "[magenta]crashed[/]",
}


def main() -> None:
    """Ask every reader, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readers", default=",".join(READERS), help=f"of {','.join(READERS)}")
    parser.add_argument("--only", default="", help="only cases whose name has this in it")
    parser.add_argument(
        "--python-for",
        action="append",
        default=[],
        metavar="READER=PATH",
        help="run a reader by another environment's python, if its packages clash",
    )
    parser.add_argument("--show", action="store_true", help="say of every answer what was wrong")
    ask = parser.parse_args()
    pythons = dict(pair.split("=", 1) for pair in ask.python_for)
    used: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="lepton-conformance-") as folder:
        asked = [c for c in cases(Path(folder)) if ask.only in c.name]
        file = Path(folder) / "cases.pickle"
        file.write_bytes(pickle.dumps(asked))
        found: Answers = {}
        for name in ask.readers.split(","):
            python = pythons.get(name, sys.executable)
            there = versions(python, READERS[name].needs)
            missing = [m for m, version in there.items() if version is None]
            if missing:
                print(f"{READERS[name].title}: left out, {', '.join(missing)} not installed")
                continue
            used[name] = ", ".join(f"{m} {version}" for m, version in there.items())
            found[name] = answers(name, file, asked, python)
    show(asked, found, everything=ask.show)
    if not ask.only:
        record(claims_of(asked, found), "conformance")
        write({"versions": used, "cases": matrix(asked, found)}, "conformance_matrix.json")
        write(markdown(asked, found, used), "conformance.md")


def answers(name: str, file: Path, asked: list[Case], python: str) -> dict[str, dict[str, str]]:
    """Return a reader's answers by case; where its process dies, the next begins after it."""
    found: dict[str, dict[str, str]] = {}
    environment = {**os.environ, "PYTHONPATH": str(HERE), "TZ": "UTC"}
    while len(found) < len(asked):
        ask = [python, "-m", "benchmarks.conformance_once", name, str(file)]
        done = subprocess.run(
            [*ask, str(len(found))], cwd=HERE, env=environment, capture_output=True, text=True
        )
        lines = [json.loads(x) for x in done.stdout.splitlines() if x.startswith('{"case"')]
        found |= {o["case"]: {"outcome": o["outcome"], "detail": o["detail"]} for o in lines}
        if len(found) < len(asked):
            said = " ".join(done.stderr.split())[-3000:]
            found[asked[len(found)].name] = {"outcome": "crashed", "detail": anywhere(said)[-300:]}
    return found


def show(asked: list[Case], found: Answers, *, everything: bool) -> None:
    """Print a line a case and a column a reader."""
    table = Table("feature", *(READERS[r].title for r in found), title="Delta conformance")
    for group, title in GROUPS.items():
        mine = [c for c in asked if c.group == group]
        if mine:
            table.add_section()
            table.add_row(f"[bold]{title}[/]")
        for case in mine:
            marks = [MARKS[found[r][case.name]["outcome"]] for r in found]
            table.add_row(f"  {case.feature}", *marks)
    Console(width=200).print(table)
    for reader in found if everything else ():
        for case in asked:
            one = found[reader][case.name]
            if one["outcome"] != "right":
                print(f"{reader} {case.name}: {one['outcome']}: {one['detail']}")


def claims_of(asked: list[Case], found: Answers) -> list[Claim]:
    """Return the counts by reader; lepton's have goals."""
    claims: list[Claim] = []
    for reader, given in found.items():
        ours = reader.startswith("lepton")
        counts = Counter(given[c.name]["outcome"] for c in asked)
        title = READERS[reader].title
        broken = counts["error"] + counts["crashed"]
        answered = counts["right"] + counts["refused"]
        claims += [
            claim(f"{title}: right of {len(asked)}", counts["right"], None, "cases"),
            claim(f"{title}: right or refused", answered, len(asked) if ours else None, "cases"),
            claim(
                f"{title}: silently different",
                counts["different"],
                0 if ours else None,
                "cases",
                -1,
            ),
            claim(f"{title}: unclear errors", broken, 0 if ours else None, "cases", -1),
        ]
    return claims


def matrix(asked: list[Case], found: Answers) -> list[dict[str, Any]]:
    """Return every answer of every reader."""
    return [
        {"name": c.name, "group": c.group, "feature": c.feature}
        | {reader: given[c.name] for reader, given in found.items()}
        for c in asked
    ]


def markdown(asked: list[Case], found: Answers, used: dict[str, str]) -> str:
    """Return the table for people: right answers by feature, and how many differ in silence."""
    head = ["", *(READERS[r].title for r in found)]
    lines = [head, ["---", *("---:" for _ in found)]]
    for group, title in GROUPS.items():
        mine = [c.name for c in asked if c.group == group]
        lines.append([f"{title} ({len(mine)})", *(_cell(found[r], mine) for r in found)])
    every = [c.name for c in asked]
    lines.append([f"**all ({len(every)})**", *(_cell(found[r], every) for r in found)])
    legend = "Right answers; ✗: silently different; r: refused by name; e: another error.\n"
    legend += f"Compared: {'; '.join(filter(None, dict.fromkeys(used.values())))}.\n"
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{legend}"


def _cell(given: dict[str, dict[str, str]], names: list[str]) -> str:
    counts = Counter(given[n]["outcome"] for n in names)
    broken = counts["error"] + counts["crashed"]
    parts = [str(counts["right"])]
    parts += [f"**{counts['different']} ✗**"] if counts["different"] else []
    parts += [f"{counts['refused']} r"] if counts["refused"] else []
    parts += [f"{broken} e"] if broken else []
    return ", ".join(parts)


def versions(python: str, names: Sequence[str]) -> dict[str, str | None]:
    """Return the versions of some distributions in an environment; None where it has none."""
    done = subprocess.run(
        [python, "-c", _VERSIONS, *names], capture_output=True, text=True, check=True
    )
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


_VERSIONS = """
import importlib.metadata, json, sys
found = {d.name.lower().replace("-", "_"): d.version for d in importlib.metadata.distributions()}
print(json.dumps({name: found.get(name) for name in sys.argv[1:]}))
"""


if __name__ == "__main__":
    main()
