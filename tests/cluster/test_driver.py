"""The driver itself is killed: the same script goes on from the last checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lepton.training.progress import newest_step


@pytest.mark.parametrize("where", ["here", "s3"])
def test_the_same_script_goes_on_after_its_driver_was_killed(
    tmp_path: Path, where: str, request: pytest.FixtureRequest
) -> None:
    script = [sys.executable, str(Path(__file__).with_name("driver.py")), str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    if where == "s3":
        pytest.importorskip("obstore")
        environment |= request.getfixturevalue("options")
        script.append("s3://lake/driver")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    driver = subprocess.Popen(script, **quiet, start_new_session=True)
    end = time.monotonic() + 180
    while (newest_step(tmp_path / "runs" / "r") or (0, 0.0))[0] < 50:
        assert time.monotonic() < end
        assert driver.poll() is None
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait(10)

    done = subprocess.run(
        script, capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])

    assert found["steps"] == 300
    assert found["exact"]
    assert found["starts"][-1] >= 40
    assert found["starts"][-1] % 20 == 0
    assert found["replayed"] < 300
    assert (tmp_path / "runs/r/checkpoints").exists() == (where == "here")
