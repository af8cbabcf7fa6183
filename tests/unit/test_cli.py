"""The command line over a small home; usage errors and failures have their exit codes."""

import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import lepton
from lepton import cluster
from lepton.cli import main
from lepton.errors import CheckpointError
from lepton.training import load_run

LOOP = """
import torch

def loop(worker):
    net = torch.nn.Linear(2, 2)
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
    for batch in worker.batches():
        scores = net(batch["x"])
        worker.step(torch.nn.functional.cross_entropy(scores, batch["y"], reduction="sum"))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    x = np.random.default_rng(0).normal(size=(60, 2)).astype("float32")
    lepton.write(pa.table({"x": list(x), "y": x.argmax(1)}), folder / "lake")
    (folder / "own.py").write_text(LOOP)
    train = ["train", f"{folder}/own.py:loop", "--table", f"{folder}/lake", "--name", "mine"]
    assert main([*train, "--batch-size", "20", "--epochs", "2", "--home", str(folder)]) == 0
    lepton.register(load_run("mine", str(folder)), "m", metrics={"f1": 0.5}, home=folder)
    return folder


def test_lists_runs_models_and_traces(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, word in (("runs", "mine"), ("models", "0.5000"), ("trace", "lepton.train")):
        assert main([command, "--home", str(home)]) == 0
        assert word in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["promote", "nobody"], "has no version"),
        (["promote", "m", "--gate", "f1 > 0.9"], "did not pass its gate"),
        (["promote", "m", "7"], "has no version 7"),
        (["promote", "m", "--canary", "0.5,0.1"], "canary"),
        (["abort", "m"], "has no canary or shadow"),
        (["rollback", "m"], "no former champion"),
        (["serve", "m", "--replicas", "0-2", "--grpc-port", "0"], "one replica has to stay"),
        (["serve", "m", "m"], "each once"),
        (["serve", "m", "--replicas", "2-1"], "replicas=(2, 1) must be"),
        (["trace", "ff"], "no spans of ff"),
        (["train", "own.py:loop"], "needs --table and --name"),
    ],
)
def test_a_failure_says_why_and_exits_with_one(
    home: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([*arguments, "--home", str(home)]) == 1
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_wrong_usage_exits_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["nonsense"], ["train", "x.py", "--workers", "many"], []):
        with pytest.raises(SystemExit) as raised:
            main(arguments)
        assert raised.value.code == 2
    assert "neither a number nor MIN-MAX" in capsys.readouterr().err


def test_looks_after_a_table(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = str(home / "small")
    for i in range(3):
        lepton.write(pa.table({"x": [i]}), own)
    where = ["--home", str(home)]
    assert main(["optimize", own, "--dry-run", *where]) == 0
    assert lepton.table(own).version == 2
    assert main(["optimize", own, "--zorder", "x", *where]) == 0
    assert len(lepton.table(own).files()) == 1
    assert main(["vacuum", f"{home}/lake", *where]) == 0
    assert main(["vacuum", own, "--delete", *where]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for words in ("may be rewritten", "became 1", "stays for model m version 1", "0 files of 0"):
        assert words in told
    assert main(["optimize", own, "--zorder", "y", *where]) == 1
    assert lepton.table(own, version=2).count_rows() == 3


def test_says_more_of_a_version_and_deletes_one(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("kept", "other"):
        lepton.register(load_run("mine", str(home)), name, home=home)
    where = ["--home", str(home)]

    def models(*arguments: str) -> str:
        status = main(["models", *arguments, *where])
        told = capsys.readouterr()
        assert status == (1 if told.err else 0)
        return " ".join((told.out + told.err).split())

    told = models("kept", "1", "--tag", "area=a=b", "--tag", "x=y", "--note", "[b]", "--protect")
    for words in ("protected", "area=a=b", "x=y", "[b]", "kept"):
        assert words in told
    assert "other" not in told
    assert "is protected: take" in models("kept", "1", "--delete")
    then = datetime.now(UTC).isoformat()
    told = models("kept", "1", "--unprotect", "--tag", "x=")
    assert "protected" not in told
    assert "x=y" not in told
    assert "protected" in models("kept", "--at", then)
    assert "kept" not in models("kept", "1", "--delete")
    assert "has no version 1" in models("kept", "1", "--delete")
    assert "no model 'nobody'" in models("nobody")
    assert "name the model and the version" in models("kept", "--protect")
    assert "do not go together" in models("kept", "1", "--protect", "--unprotect")
    assert "goes with no other" in models("kept", "1", "--delete", "--protect")
    assert "must be NAME=TEXT" in models("kept", "1", "--tag", "x")


def test_an_evaluation_says_what_its_figures_were_measured_on(home: Path) -> None:
    run = load_run("mine", str(home))
    table = lepton.table(home / "lake")
    judged = lepton.evaluate(run, table, label="y", home=str(home))
    entry = lepton.register(run, "judged", metrics=judged, home=home)
    assert entry.measured == {str(table): judged.metrics}
    assert entry.metrics["f1"] == judged.metrics["f1"]
    with pytest.raises(CheckpointError, match="evaluate that one"):
        lepton.register(run, "judged", metrics=replace(judged, checkpoint="c"), home=home)


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder of as long a path as may be."""
    with tempfile.TemporaryDirectory(prefix="lt", dir="/tmp") as folder:
        yield Path(folder, "n" * (cluster._LONGEST - len(folder) - 1))


def test_a_nodes_shell_takes_up_the_settings_for_haproxy(short: Path) -> None:
    lepton = f"{sys.executable} -m lepton.cli ingress --dir {shlex.quote(str(short))}"
    node = short / ("f" * 56)  # Serve's controller puts a node's id there
    configuration = short / "haproxy.cfg"
    told = subprocess.run(
        [
            "bash",
            "-c",
            f'settings="$({lepton})" && eval "$settings" && mkdir {node} && '
            f"echo 'global\n  stats socket {node}/admin.sock' > {configuration} && "
            f'"$RAY_SERVE_HAPROXY_BINARY_PATH" -c -f {configuration} && env',
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout

    assert "RAY_SERVE_ENABLE_HA_PROXY=1" in told
    assert f"RAY_SERVE_HAPROXY_SOCKET_PATH={short}/admin.sock" in told


def test_a_folder_for_sockets_is_short_and_ones_own(
    short: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ingress", "--dir", f"{short}x"]) == 1
    assert "too long" in capsys.readouterr().err

    other = short.parent / "o"
    other.mkdir(mode=0o700)
    short.symlink_to(other)
    assert main(["ingress", "--dir", str(short)]) == 1
    assert "no folder that you alone can open" in capsys.readouterr().err

    other.chmod(0o755)
    assert main(["ingress", "--dir", str(other)]) == 1
    assert "no folder that you alone can open" in capsys.readouterr().err
