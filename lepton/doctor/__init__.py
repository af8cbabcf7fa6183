"""Is this machine fit for lepton? Each check tries the real thing and says what to do about it.

A check never raises for what it is there to find, leaves nothing behind, and imports what is
heavy only when it runs.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lepton.doctor.cluster import cluster, local_ray, ray_base, temp_dir, token
from lepton.doctor.finding import Check
from lepton.doctor.machine import gpu, memory, packages, python, shared_memory, storage
from lepton.doctor.network import collector, haproxy, ports

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Check", "check", "render"]


def check(
    home: str | None = None, address: str | None = None, *, deep: bool = False
) -> list[Check]:
    """Run all checks.

    Args:
        home: where lepton will write; ``$LEPTON_HOME`` or ``./lepton-home`` when None.
        address: a running Ray to join; ``$RAY_ADDRESS`` when None. With neither, check whether
            a local Ray could start.
        deep: start that local Ray for real, in a process of its own (some ten seconds).
    """
    env = os.environ
    address = address or env.get("RAY_ADDRESS") or "local"
    temp = ray_base(env)
    local = [ports(), temp_dir(temp), *([local_ray(temp)] if deep else [])]
    return [
        python(),
        *packages(),
        memory(),
        shared_memory(),
        *(local if address == "local" else [cluster(address)]),
        token(env),
        gpu(),
        *storage(home),
        collector(env),
        haproxy(env.get("RAY_SERVE_HAPROXY_BINARY_PATH")),
    ]


def render(checks: list[Check]) -> Table:
    """Return the checks as a table for a rich console."""
    from rich.table import Table

    table = Table("", "check", "found", "what to do", box=None)
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    for c in checks:
        table.add_row(
            f"[{colours[c.level]}]{c.level}[/]", *map(_plain, (c.name, c.detail, c.advice))
        )
    return table


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
