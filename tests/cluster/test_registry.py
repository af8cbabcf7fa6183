"""The registry under racing threads and racing processes."""

import json
import subprocess
import sys
import threading

import pytest
from deltalake import DeltaTable

from lepton.errors import RegistryError
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


def test_of_sixteen_promoters_one_wins_each_step(registry):
    for _ in range(16):
        registry.register("m", checkpoint="c", manifest_sha256="s")
    steps, start = 3, threading.Barrier(16)
    won = [[0] * 16 for _ in range(steps)]

    def promoter(number):
        own = Registry(registry.uri)  # as every process has one
        for step in range(steps):
            start.wait(120)
            expect = own.state("m").pointer.seq
            start.wait(120)
            try:
                seq = own.promote("m", (number + step) % 16 + 1, expect=expect).pointer.seq
                won[step][number] = seq
            except RegistryError:
                pass  # another one was first; or this version is champion already
            start.wait(120)

    threads = [threading.Thread(target=promoter, args=(n,), daemon=True) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [sorted(step)[-2:] for step in won] == [[0, 17], [0, 18], [0, 19]]
    winners = [step.index(max(step)) for step in won]
    promoted = [(n + step) % 16 + 1 for step, n in enumerate(winners)]
    assert [e.version for e in registry.history("m")[16:]] == promoted
