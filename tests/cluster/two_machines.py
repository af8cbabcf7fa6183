"""Two machines of one Ray cluster: network namespaces of this one, joined by a wire of their own.

Each has its own addresses, ports and loopback, as real machines have; files they share. Needs
Linux, the right to make namespaces, and the program ``ip``.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NET = "10.213.7"
GCS = f"{NET}.1:6379"
STORE = 150 * 2**20
START_S = 120


@dataclass(frozen=True)
class Machine:
    """A namespace."""

    name: str
    address: str
    wire: str
    folder: Path
    environment: dict[str, str]
    started: list[subprocess.Popen[bytes]] = field(default_factory=list[subprocess.Popen[bytes]])

    def run(self, *words: str) -> str:
        """Run a module of this environment there; return what it printed."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.name, sys.executable, "-m", *words],
            env=self.environment | {"RAY_ADDRESS": GCS},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    def start_ray(self, *options: str) -> None:
        """Start a node as an operator would, with HAProxy."""
        told = ["--disable-usage-stats", "--block", f"--node-ip-address={self.address}"]
        told += [f"--temp-dir={self.folder}/ray", f"--object-store-memory={STORE}", "--num-cpus=1"]
        ray = " ".join([f"{sys.executable} -m ray.scripts.scripts start", *told, *options])
        lepton = f"{sys.executable} -m lepton.cli ingress --dir {self.folder.parent}/in"
        command = f'settings="$({lepton})" && eval "$settings" && exec {ray}'
        with (self.folder / "ray.log").open("w") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, "bash", "-c", command],
                env=self.environment,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.started.append(process)

    def lose(self) -> None:
        """Cut the wire, so that nothing answers any more, then let every process there die."""
        _ip("-n", self.name, "link", "set", self.wire, "down")
        self.kill()

    def kill(self) -> None:
        """Let every process there die at once."""
        ask = ["ip", "netns", "pids", self.name]
        while pids := subprocess.run(ask, capture_output=True, text=True).stdout.split():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            for process in self.started:
                process.wait()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Start a head and a worker node, with a CPU and a token each; end them."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2, to make two network namespaces")
    mark = secrets.token_hex(3)
    names = [f"lepton-{mark}-{i}" for i in (1, 2)]
    folder = Path(tempfile.mkdtemp(prefix="lm-", dir="/tmp"))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("RAY_", "LEPTON_"))}
    told = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    machines: list[Machine] = []
    try:
        wires = [f"lw{mark}{i}" for i in (1, 2)]
        for i, (name, wire) in enumerate(zip(names, wires, strict=True), 1):
            (folder / str(i)).mkdir()
            try:
                _ip("netns", "add", name)
            except subprocess.CalledProcessError as e:
                pytest.skip(f"cannot make network namespaces here: {e.stderr.decode()}")
            address = f"{NET}.{i}"
            machines.append(Machine(name, address, wire, folder / str(i), kept | told))
        _ip("link", "add", wires[0], "type", "veth", "peer", "name", wires[1])
        for machine in machines:
            _ip("link", "set", machine.wire, "netns", machine.name)
            _ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", machine.wire)
            _ip("-n", machine.name, "link", "set", machine.wire, "up")
            _ip("-n", machine.name, "link", "set", "lo", "up")
        head, worker = machines
        head.start_ray("--head", "--port=6379", "--include-dashboard=false")
        worker.start_ray(f"--address={GCS}")
        _wait_for_nodes(head)
        yield head, worker
    finally:
        for machine in machines:
            machine.kill()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_nodes(head: Machine) -> None:
    end = time.monotonic() + START_S
    while True:
        try:
            if head.run("tests.cluster.machines_driver", "nodes").strip() == "2":
                return
        except AssertionError as e:
            if time.monotonic() > end:
                raise AssertionError(f"{e}\n{(head.folder / 'ray.log').read_text()}") from e
        assert time.monotonic() < end, "the second machine did not join"
        time.sleep(1)
