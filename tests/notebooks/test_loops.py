"""Other people's loops fed by the stream: each example runs, and resumes to the same losses."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["huggingface", "lightning"])
def test_the_stream_feeds_the_loop(tmp_path: Path, name: str) -> None:
    for package in ("accelerate", "lightning", "transformers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} of the extra [examples] is not installed")
    done = subprocess.run(
        [sys.executable, ROOT / "notebooks" / f"{name}_loop.py"],
        cwd=tmp_path,
        env={**os.environ, "LEPTON_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    found = re.search(r"resumed at step (\d+): (\d+) losses within (\S+)\n", done.stdout)
    assert found, done.stdout
    assert int(found[2]) > 0
    assert float(found[3]) < 1e-3
