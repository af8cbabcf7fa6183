"""Nodes added, drained and killed under a run: the workers change, no step and no row is lost."""

import json
import subprocess
import sys
from pathlib import Path


def test_nodes_come_and_go_under_a_run(tmp_path: Path) -> None:
    script = Path(__file__).with_name("nodes.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])

    assert found["steps"] == found["counted"] > 0
    assert found["replayed"] == 0
    assert found["exact"]
    assert found["counted_while_draining"] == 2, "the third node goes away"
    assert found["sizes"].count(4) >= 2
    assert found["sizes"][-1] == 3
