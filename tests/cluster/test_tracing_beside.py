"""Ray's own tracing, used by somebody else, and lepton's: neither disturbs the other."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from lepton.telemetry import spans_of
from tests.cluster.tracing_driver import THEIRS

ROOT = Path(__file__).parents[2]


def test_rays_tracing_hook_and_our_spans_work_side_by_side(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    driver = subprocess.Popen(
        [sys.executable, "-m", "tests.cluster.tracing_driver", str(tmp_path)],
        env={**os.environ, THEIRS: str(theirs), "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        out, _ = driver.communicate(timeout=400)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
        driver.wait(30)
    assert driver.returncode == 0, out[-3000:]

    lines = [json.loads(k) for f in theirs.glob("*.jsonl") for k in f.read_text().splitlines()]
    names = [line["name"] for line in lines]
    assert sum("theirs" in name and "worker" in name for name in names) == 2, names
    assert not [name for name in names if name.startswith("lepton.")]

    ours = spans_of(str(tmp_path / "traces"))
    ids = {s.span_id: s for s in ours}
    assert [s.name for s in ours if s.parent_id not in ids] == ["lepton.demo"]
    assert len({s.trace_id for s in ours}) == 1
    steps = [s for s in ours if s.name == "lepton.steps"]
    assert (
        sum(s.attributes["lepton.steps"] for s in steps if s.attributes["lepton.rank"] == 0) == 10
    )
    assert len({s.process for s in steps}) == 2
    assert {ids[s.parent_id or ""].name for s in steps} == {"lepton.train"}
    assert {s.name for s in ours} >= {"lepton.read", "lepton.checkpoint", "lepton.train.epoch"}
