"""A real Ray cluster of two nodes with a token, for tests of what crosses nodes.

Use it from a fixture of the scope that fits::

    @pytest.fixture(scope="module")
    def cluster(tmp_path_factory):
        with two_node_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
            yield cluster
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Cluster:
    """A running cluster; ``variables`` are the ones that point Ray at it."""

    directory: Path
    variables: Mapping[str, str]

    def run(self, *command: str, **changed: str) -> subprocess.CompletedProcess[str]:
        """Run a command of this virtual environment against the cluster, from the root."""
        here = Path(sys.executable).parent
        path = os.pathsep.join([str(here), os.environ["PATH"]])
        return subprocess.run(
            [str(here / command[0]), *command[1:]],
            env={**os.environ, "PATH": path, **self.variables, **changed},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def status(self) -> dict[str, Any]:
        """Return ``alive_nodes`` and the numbers of the cluster's ``processes``."""
        return json.loads(local("status", self.directory))

    def stop(self) -> None:
        """End the cluster's processes; harmless when it has been stopped."""
        local("stop", self.directory)


def local(command: str, directory: Path, *options: str) -> str:
    """Run clusters/local.py and return what it printed."""
    asked = [sys.executable, str(ROOT / "clusters" / "local.py"), command, "--dir", str(directory)]
    done = subprocess.run([*asked, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def two_node_cluster(directory: Path, *, cpus: int = 2) -> Iterator[Cluster]:
    """Start two nodes with ``cpus`` logical CPUs each, and stop them at the end."""
    lines = local("start", directory, "--nodes=2", f"--cpus={cpus}").splitlines()
    exported = (line.removeprefix("export ").partition("=") for line in lines)
    cluster = Cluster(directory, {name: value.strip("'") for name, _, value in exported})
    try:
        yield cluster
    finally:
        cluster.stop()
