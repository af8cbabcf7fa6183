"""Waiting for room on the cluster: one visible line, and an end if the person set one.

A run waits for its workers' places first; then, if Ray Data reads for it, for a CPU to read with.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private.state import state as cluster_state  # Ray Train counts by it, too

from lepton.errors import TrainingError
from lepton.training.room import fitting, less_a_cpu, missing

ROOM_S = 3.0
"""How long a run waits for room before it says so."""
READ_S = 10.0
"""How long its workers wait for their first rows before it is looked into why."""


def room_for(each: Mapping[str, float], *, reading: bool) -> int:
    """How many workers the cluster has room for now, nodes that go away left out.

    Args:
        each: resources of one.
        reading: whether Ray Data's tasks are to find a CPU beside them.
    """
    free = _free()
    return fitting(less_a_cpu(free) if reading else free, each)


@dataclass
class Waiting:
    """A run that waits for its first workers.

    Attributes:
        run: its name.
        wanted: workers that it starts with.
        each: resources of one.
        timeout_s: when it gives up, seconds; None: never.
        reading: whether Ray Data's tasks read for it.
    """

    run: str
    wanted: int
    each: Mapping[str, float]
    timeout_s: float | None = None
    reading: bool = False
    _since: float = field(default_factory=time.monotonic)
    _said: bool = False
    _started: float | None = None

    def look(self, *, started: bool, stepped: bool) -> None:
        """Say once what is missing, and end the waiting when its time is over.

        Args:
            started: whether any worker has come.
            stepped: whether any step was made, so that rows have come.

        Raises:
            TrainingError: none has come within ``timeout_s``.
        """
        if started:
            self._look_at_readers(stepped=stepped)
        waited = time.monotonic() - self._since
        over = self.timeout_s is not None and waited > self.timeout_s
        if started or not (over or (not self._said and waited > ROOM_S)):
            return
        lacking = self._lacking()
        if lacking and not self._said:
            self._said = True
            sys.stderr.write(f"run {self.run!r} waits for room: {lacking}\n")
        if over:
            why = lacking or "they have their place, but none has begun: look into Ray's logs"
            raise TrainingError(
                f"run {self.run!r} could not start within start_timeout_s={self.timeout_s:g}: "
                f"{why}. Free or add resources, or ask for fewer by workers= or resources=; "
                "nothing was begun"
            )

    def _look_at_readers(self, *, stepped: bool) -> None:
        """Say once if nobody can read: others have all the CPUs."""
        now = time.monotonic()
        self._started = self._started or now
        if not self.reading or now - self._started < READ_S:
            return
        self.reading = False  # it is looked at once
        if not stepped and fitting(_free(), {"CPU": 1}) == 0:
            sys.stderr.write(
                f"run {self.run!r} waits for rows: Ray Data's tasks read them, and no node has a "
                "CPU left for one. Free or add CPUs, ask for fewer workers, or stream with "
                "engine='worker', which reads in the workers\n"
            )

    def _lacking(self) -> str:
        """What is missing, if Ray has found no place for the workers yet."""
        free = _free()
        if fitting(free, self.each) >= self.wanted or not _placing(self.wanted, self.each):
            return ""  # they have their place, or get it now
        return missing(self.wanted, self.each, free, _whole())


def _placing(wanted: int, each: Mapping[str, float]) -> bool:
    """Whether Ray still looks for a place for such a group of workers."""
    groups: Any = cluster_state.placement_group_table()
    needs = {k: v for k, v in each.items() if v > 0}
    return any(
        group["state"] in ("PENDING", "INFEASIBLE")
        and len(group["bundles"]) == wanted
        and all({k: v for k, v in b.items() if v > 0} == needs for b in group["bundles"].values())
        for group in groups.values()
    )


def _free() -> list[Mapping[str, float]]:
    return _staying(cluster_state.available_resources_per_node())


def _whole() -> list[Mapping[str, float]]:
    return _staying(cluster_state.total_resources_per_node())


def _staying(nodes: Any) -> list[Mapping[str, float]]:
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    draining = set(cluster_state.get_draining_nodes())
    return [found for node, found in nodes.items() if node in alive - draining]
