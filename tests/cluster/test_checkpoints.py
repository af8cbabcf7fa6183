"""Checkpoints are whole or invisible, also when their writer is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from lepton import checkpoints

WRITER = """
import sys, torch
from lepton import checkpoints
state = {"net": {"w": torch.ones(200_000)}}
step = int(sys.argv[2])
print("ready", flush=True)
while True:
    step += 1
    checkpoints.save(sys.argv[1], step=step, state=state,
                     cursor={"v": 1, "epoch": 0, "rows": step, "order": ""})
    print(step, flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    for life in range(3):
        before = checkpoints.latest(tmp_path)
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(before.step if before else 0)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(3 + 5 * life)]
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()

        for manifest in checkpoints.all_of(tmp_path):
            checkpoints.verify(manifest)
        newest = checkpoints.latest(tmp_path)
        assert newest is not None
        assert newest.step >= int(lines[-1])
