"""The driver itself is killed: the same script goes on from the last checkpoint, kept on S3."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lepton.training.progress import newest_step


def test_the_same_script_goes_on_after_its_driver_was_killed(
    tmp_path: Path, options: dict[str, str]
) -> None:
    pytest.importorskip("obstore")
    script = [sys.executable, str(Path(__file__).with_name("driver.py")), str(tmp_path)]
    script.append("s3://lake/driver")
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment |= options | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
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
    assert not (tmp_path / "runs/r/checkpoints").exists()
