"""Nodes added, drained and killed under a run: the workers change, no step and no row is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def made_by(script: str, home: Path) -> dict[str, Any]:
    """Run a script on a cluster of its own; return what it prints.

    Without tokens, whatever this process uses: Ray's clusters for tests do not know them.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"tests.cluster.{script}", str(home)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_nodes_come_and_go_under_a_run(tmp_path: Path) -> None:
    found = made_by("nodes", tmp_path)

    assert found["steps"] == found["counted"] > 0
    assert found["replayed"] == 0
    assert found["exact"]
    assert found["counted_while_draining"] == 2, "the third node goes away"
    assert found["sizes"].count(4) >= 2
    assert found["sizes"][-1] == 3


def test_the_autoscaler_adds_the_nodes_that_a_run_has_use_for(tmp_path: Path) -> None:
    found = made_by("nodes_autoscaled", tmp_path)

    assert found["nodes"] == 3
    assert found["sizes"][0] == 1
    assert found["sizes"][-1] == 3
    assert found["replayed"] == 0
    assert found["exact"]
