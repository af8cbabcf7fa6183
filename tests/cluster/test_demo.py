"""The demo as a person runs it: the command, what it prints, what it leaves, and Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.compute as pc
import pytest

import lepton
from lepton.registry import Registry
from lepton.telemetry import spans_of
from lepton.training import load_run
from tests.cluster.chromium import open_page

LEPTON = str(Path(sys.executable).with_name("lepton"))


def processes_naming(text: str) -> list[str]:
    """Command lines and environments of live processes that mention a text, this one left out."""
    found: list[str] = []
    for folder in Path("/proc").glob("[0-9]*"):
        if folder.name == str(os.getpid()):
            continue
        try:
            command = (folder / "cmdline").read_bytes()
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        if text.encode() in command + environment:
            found.append(f"{folder.name}: {command[:200]!r}")
    return found


def assert_gone(text: str) -> None:
    end = time.monotonic() + 180
    while left := processes_naming(text):
        assert time.monotonic() < end, f"processes left behind: {left}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    out = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [LEPTON, "demo", "--out", str(out)],
        env={**os.environ, "LEPTON_TEST_MARK": f"mark-{out}"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return out, done.stdout.splitlines()


def test_says_what_happened_in_few_lines(demo: tuple[Path, list[str]]) -> None:
    _, lines = demo
    text = "\n".join(lines)

    assert len(lines) <= 25
    assert "killed (SIGKILL)" in text
    assert "rows lost 0, repeated 0 of 23120" in text
    assert re.search(r"order hash \w+ = the plan's; steps replayed 0", text)
    assert "gate accuracy >= 0.9662 passed; version 2 at 10%, then version 2 at 100 %" in text
    assert re.search(r"\d{3} requests, 0 failed \(version 1: \d+, version 2: \d+\)", text)


def test_leaves_no_process_behind(demo: tuple[Path, list[str]]) -> None:
    assert_gone(f"mark-{demo[0]}")


def test_the_weights_are_made_of_every_row_once(demo: tuple[Path, list[str]]) -> None:
    out, _ = demo
    run = load_run("digits-1", str(out))
    table = lepton.table(out / "lake" / "digits", version=1)
    rows = table.where("split = 'train'")
    stream = rows.stream(batch_size=128, epochs=16, columns=["pixels", "label"], lanes=2)

    assert len(run.attempts) >= 2
    assert run.replayed == 0
    assert run.consumption(stream).exact


def test_the_lake_holds_the_whole_story(demo: tuple[Path, list[str]]) -> None:
    out, _ = demo
    registry = Registry(out / "registry")
    champion = registry.version("digits", "champion")
    evaluations = lepton.table(out / "evaluations").to_arrow()
    answers = lepton.table(out / "answers" / "digits").to_arrow()

    assert champion.version == 2
    assert champion.metrics["accuracy"] >= 0.9662
    assert champion.lineage["table"] == str(out / "lake" / "digits")
    assert champion.lineage["table_version"] == 1
    assert champion.lineage["cursor"]["epoch"] == 16
    assert [e.kind for e in registry.history("digits")] == [
        "registered",
        "registered",
        "promoted",
        "canary",
        "promoted",
    ]
    assert champion.metrics["accuracy"] in evaluations["accuracy"].to_pylist()
    assert set(answers["status"].to_pylist()) == {200}
    assert set(answers["version"].to_pylist()) == {1, 2}
    assert len(answers) >= 300


def test_one_trace_joins_it_all(demo: tuple[Path, list[str]]) -> None:
    out, _ = demo
    spans = spans_of(str(out / "traces"))
    ids = {s.span_id for s in spans}
    answers = lepton.table(out / "answers" / "digits").to_arrow()
    champion = Registry(out / "registry").version("digits", "champion")

    assert len({s.trace_id for s in spans}) == 1
    assert [s.name for s in spans if s.parent_id not in ids] == ["lepton.demo"]
    assert {s.name for s in spans} >= {
        "lepton.table",
        "lepton.read",
        "lepton.train",
        "lepton.train.epoch",
        "lepton.train.failure",
        "lepton.checkpoint",
        "lepton.evaluate",
        "lepton.register",
        "lepton.promote",
        "lepton.gate",
        "lepton.canary",
        "lepton.request",
    }
    assert len({s.process for s in spans}) >= 4
    assert set(answers["trace_id"].to_pylist()) == {spans[0].trace_id} == {champion.trace_id}
    requests = [s for s in spans if s.name == "lepton.request"]
    assert len(requests) == pc.sum(pc.equal(answers["row"], 0)).as_py()
    checkpoint = champion.lineage["traceparent"].split("-")[2]
    assert any(link.endswith(checkpoint) for s in requests for link in s.links)


def test_the_report_opens_in_a_browser_without_a_network(
    demo: tuple[Path, list[str]], tmp_path: Path
) -> None:
    out, _ = demo
    source = (out / "report.html").read_text()
    page = open_page(out / "report.html", tmp_path)

    assert "http://" not in source.replace("http://127.0.0.1", "")
    assert "https://" not in source
    assert page.console == ""
    assert "worker killed, " in page.dom
    assert page.dom.count('class="row"') >= 15
    assert page.dom.count("<figure") == 24
    assert len(page.screenshot) > 50_000  # a blank page of this size compresses to a tenth


def heed_ctrl_c() -> None:
    """Tests that a shell runs in the background ignore it, and so would their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_leaves_nothing_behind_and_names_the_stage(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [LEPTON, "demo", "--out", str(out)],
        env={**os.environ, "LEPTON_TEST_MARK": f"mark-{out}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=heed_ctrl_c,
    )
    end = time.monotonic() + 300
    while not list((out / "runs").glob("*/steps/*.jsonl")):  # the workers are training
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)

    assert process.returncode == 130, printed
    assert "interrupted during stage 'train'" in printed
    assert_gone(f"mark-{out}")


def test_a_failing_stage_is_named(tmp_path: Path) -> None:
    (tmp_path / "lake").write_text("a file where the demo wants a folder")
    done = subprocess.run(
        [LEPTON, "demo", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 1
    assert "stage 'table' failed" in done.stderr
