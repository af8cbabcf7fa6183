"""The notebook about serving, run as a script."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.cluster.test_demo import assert_gone

SCRIPT = Path(__file__).parents[2] / "notebooks" / "serving.py"
PRINTED = re.compile(
    r"(?:run signs-0-\d: .*\n)*"
    r"version 1 answers at http://127\.0\.0\.1:\d+/signs\n"
    r"three forms, the same answers: True\n"
    r"version 2 at shadow of 100%\n"
    r"version 2 at 50%\n"
    r"version 2 at 100 %\n"
    r"version 1 is champion again\n"
    r"0 requests failed; versions \[1, 2\]\n"
    r"\[\(1, 'champion'\), \(2, 'canary'\), (?:\(2, 'champion'\), )?\(2, 'shadow'\)\]\n"
    r"\d+ rows answered in \S+/lake/signs_answers@0\n"
)


def test_runs_as_a_script(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        cwd=tmp_path,
        env={**os.environ, "LEPTON_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert PRINTED.fullmatch(done.stdout), done.stdout
    assert_gone(str(tmp_path / "home"))
