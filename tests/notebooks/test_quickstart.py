"""The quickstart as a notebook, and as a script that is a job on a cluster of two nodes."""

import re
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

import lepton
from lepton.registry import Registry
from tests.cluster.test_demo import assert_gone
from tests.cluster.two_nodes import two_node_cluster

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "notebooks" / "quickstart.py"
NOTEBOOK = SCRIPT.with_suffix(".ipynb")
PRINTED = re.compile(
    r"\S+/lake/machines@0: \d+ rows to train, \d+ to test\n"
    r"(?:run machines-0: .*\n)*"  # progress, where it takes long and both streams go to one
    r"78 steps, accuracy 0\.9\d+, version 1 at http://127\.0\.0\.1:\d+/machines\n"
    r"answers (\[[01, ]+\]), labels \[[01, ]+\]\n"
    r"5 labelled answers in \S+/feedback/machines@0\n"
)
SLOWER = "requests will go through Ray Serve's own proxy"


def assert_closed_the_loop(home: Path) -> None:
    champion = Registry(home / "registry").version("machines", "champion")
    feedback = lepton.table(home / "feedback" / "machines")

    assert champion.metrics["accuracy"] >= 0.9
    assert champion.lineage["table"] == str(home / "lake" / "machines")
    assert feedback.count_rows() == 5
    assert {"temperature", "vibration", "site", "fault", "version"} <= set(feedback.schema.names)


@pytest.mark.parametrize("script", sorted(SCRIPT.parent.glob("*.py")), ids=lambda p: p.stem)
def test_the_notebook_is_the_script_and_carries_no_output(script: Path) -> None:
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    script = jupytext.read(script)

    assert [(c.cell_type, c.source) for c in script.cells] == [
        (c.cell_type, c.source) for c in notebook.cells
    ]
    assert all(not c.get("outputs") for c in notebook.cells)


def test_runs_as_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEPTON_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)

    NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()

    outputs = [o for c in notebook.cells for o in c.get("outputs", [])]
    printed = "".join(o["text"] for o in outputs if o.get("name") == "stdout")
    assert PRINTED.fullmatch(printed), printed
    assert_closed_the_loop(tmp_path / "home")
    assert_gone(str(tmp_path / "home"))


def test_runs_as_a_job_on_two_nodes(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with two_node_cluster(tmp_path / "cluster", cpus=4) as cluster:
        done = cluster.run(
            "ray",
            "job",
            "submit",
            "--working-dir=.",
            f'--runtime-env-json={{"env_vars": {{"LEPTON_HOME": "{home}"}}}}',
            "--",
            "python",
            "notebooks/quickstart.py",
        )

        assert done.returncode == 0, done.stdout + done.stderr
        # its nodes were started without HAProxy, of which a line warns
        lines = done.stdout.splitlines(keepends=True)
        assert sum(SLOWER in line for line in lines) == 1
        printed = "".join(line for line in lines if SLOWER not in line)
        assert PRINTED.search(printed), done.stdout
    assert_closed_the_loop(home)
