"""The live line in a real notebook."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = """
from pathlib import Path
from lepton.training.evaluations import Judged
from lepton.training.progress import watch
steps = Path("digits/steps")
steps.mkdir(parents=True)
(steps / "0000.json").write_text('{"number": 0, "session": "s", "step": 0, "world_size": 2,'
    '"pids": [1], "hosts": ["h"], "time_ns": 0}')
with watch(steps.parent, 9, 64, show=True):
    for n in range(1, 10):
        with (steps / "0000-0000.jsonl").open("a") as log:
            log.write('{"made":%d,"loss":0.5,"time_ns":1}\\n' % n)
"""


def test_in_a_notebook_one_line_is_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs

    assert [o.output_type for o in outputs] == ["display_data"]
    assert outputs[0].data["text/plain"].startswith("training digits: step 9/9  loss 0.5000")
