"""The registry under racing threads and racing processes."""

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise

import pytest
from deltalake import DeltaTable

from lepton.errors import ConflictError, RegistryError
from lepton.registry import Registry


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "home" / "registry")


def test_threads_may_share_a_registry(registry):
    def work():
        for _ in range(3):
            registry.register("m", checkpoint="c.json", manifest_sha256="s")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    history = Registry(registry.uri).history("m")
    assert [(e.seq, e.version) for e in history] == [(n, n) for n in range(1, 13)]


RACER = """
import json, sys
from lepton.errors import ConflictError
from lepton.registry import Registry

registry = Registry(sys.argv[1])

def turn(say):
    print(json.dumps(say), flush=True)
    return json.loads(sys.stdin.readline())

turn("ready")
mine = registry.register("m", checkpoint="c", manifest_sha256="s").version
expect = turn(mine)
try:
    won = registry.promote("m", mine, expect=expect).pointer.seq
except ConflictError:
    won = None
turn(won)
turn(won or registry.promote("m", mine, expect=None).pointer.seq)
"""


def test_six_processes_race_and_every_event_has_one_winner(registry):
    racers = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", RACER, registry.uri],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]

    def hear():
        return [json.loads(r.stdout.readline()) for r in racers]

    def say(word):
        for r in racers:
            r.stdin.write(json.dumps(word) + "\n")
            r.stdin.flush()

    try:
        assert hear() == ["ready"] * 6  # no table yet: making it is part of the race
        say("register")
        versions = hear()
        say(6)
        won = hear()
        say("promote")
        promoted = hear()
        say("end")
    finally:
        for r in racers:
            r.communicate()
    assert [r.returncode for r in racers] == [0] * 6
    assert sorted(versions) == [1, 2, 3, 4, 5, 6]
    assert [w for w in won if w is not None] == [7]  # the other five got a ConflictError
    assert sorted(promoted) == [7, 8, 9, 10, 11, 12]
    rows = DeltaTable(registry.uri).to_pyarrow_table().to_pylist()
    assert sorted(r["seq"] for r in rows) == list(range(1, 13))
    history = registry.history("m")
    assert {e.seq: e.version for e in history[6:]} == dict(zip(promoted, versions, strict=True))
    assert registry.state("m").pointer.champion == history[-1].version


def one_wins_each_step(opened, steps, rivals=16):
    """Have rivals, each with a registry of its own, promote at once, step by step.

    At every step somebody registers, tags and moves an alias, too, which costs nobody a promotion.
    """
    for _ in range(rivals):
        opened().register("m", checkpoint="c", manifest_sha256="s")
    start = threading.Barrier(rivals + 1, timeout=120)

    def promoter(number):
        own, won = opened(), []  # as every process has one
        for step in range(steps):
            start.wait()
            expect = own.state("m").pointer.seq
            start.wait()
            with suppress(RegistryError):  # another was first; or this version is champion already
                moved = own.promote("m", (number + step) % rivals + 1, expect=expect)
                won.append((step, moved.pointer.champion))
            start.wait()
        return won

    def bystander():
        own = opened()
        for step in range(steps):
            start.wait()
            start.wait()
            own.register("m", checkpoint="c", manifest_sha256="s")
            own.describe("m", 1, tags={"step": str(step)})
            own.alias("m", "latest", step + 1)
            start.wait()
        return []

    with ThreadPoolExecutor(rivals + 1) as pool:
        asked = [pool.submit(promoter, number) for number in range(rivals)]
        asked.append(pool.submit(bystander))
        winners = sorted(won for one in asked for won in one.result())
    history = opened().history("m")
    assert [e.seq for e in history] == list(range(1, rivals + 4 * steps + 1))
    promoted = [e.version for e in history if e.kind == "promoted"]
    assert winners == list(enumerate(promoted))
    assert len(winners) == steps


def test_of_sixteen_promoters_one_wins_each_step(registry):
    one_wins_each_step(lambda: Registry(registry.uri), steps=8)


def test_an_alias_that_many_move_at_once_has_one_winner_a_step_and_a_history(registry):
    rivals = 8
    for _ in range(rivals):
        registry.register("m", checkpoint="c", manifest_sha256="s")
    seen = registry.state("m").pointer.seq

    def move(version, expect, alias="best"):
        try:
            return Registry(registry.uri).alias("m", alias, version, expect=expect).aliases[alias]
        except ConflictError:
            return None

    with ThreadPoolExecutor(rivals) as pool:
        won = list(pool.map(move, range(1, rivals + 1), [seen] * rivals))
        assert len([w for w in won if w is not None]) == 1
        free = list(pool.map(move, range(1, rivals + 1), [None] * rivals))
        own = list(pool.map(move, [1] * rivals, [seen] * rivals, "abcdefgh"))
    assert free == list(range(1, rivals + 1))
    assert own == [1] * rivals  # another alias is another matter
    moves = [e for e in Registry(registry.uri).history("m") if e.kind == "aliased"]
    assert [e.seq for e in moves] == list(range(rivals + 1, 3 * rivals + 2))
    best = [e for e in moves if e.details["alias"] == "best"]
    assert registry.version("m", "best").version == best[-1].version
    for event, following in pairwise(moves):
        if event.time < following.time:
            then = registry.at("m", event.time).aliases
            assert then[event.details["alias"]] == event.version
