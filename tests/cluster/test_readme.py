"""The README's code is run as a person would: copied into a script."""

import os
import subprocess
import sys
from pathlib import Path

from sybil import Document
from sybil.parsers.markdown import CodeBlockParser

ROOT = Path(__file__).parents[2]


def test_the_readme_examples_run(tmp_path: Path) -> None:
    parser = CodeBlockParser(language="python", evaluator=lambda _: None)
    text = (ROOT / "README.md").read_text()
    blocks = [str(region.parsed) for region in parser(Document(text, "README.md"))]
    assert len(blocks) == 2
    assert len([line for line in blocks[0].splitlines() if line.strip()]) <= 30
    (tmp_path / "example.py").write_text("\n".join(blocks))

    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env={**os.environ, "LEPTON_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "/machines {'output': array(" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert "'accuracy': " in last
    assert "search-" in last
    assert "Traceback" not in done.stderr
