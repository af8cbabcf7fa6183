"""The commands that look at a home: a real run, two models' versions, and answers of requests."""

import json
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

import lepton
from lepton.cli import main
from lepton.pipeline.spantable import add_spans
from lepton.pipeline.tracing import find_trace
from lepton.registry import Registry
from lepton.serving.answers import Answer, AnswerLog
from lepton.telemetry import Carrier, record, spans_of
from lepton.training import Run, load_run

REQUEST = "4711"


def loop(worker: lepton.Worker) -> None:
    net = torch.nn.Linear(2, 2)
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
    for batch in worker.batches():
        scores = net(batch["x"])
        worker.step(torch.nn.functional.cross_entropy(scores, batch["y"], reduction="sum"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 60 rows, the run r, version 1 of the model m, and one answer by it."""
    folder = tmp_path_factory.mktemp("looked-at")
    x = np.random.default_rng(0).normal(size=(60, 2)).astype("float32")
    rows = lepton.write(pa.table({"x": list(x), "y": x.argmax(1)}), folder / "lake")
    run = lepton.train(loop, rows.stream(batch_size=20, epochs=2), name="r", home=folder)
    found = lepton.evaluate(run, rows, label="y", home=str(folder))
    version = lepton.register(run, "m", metrics=found.metrics, home=folder)
    asked = record(
        "lepton.request",
        Carrier("", str(folder / "traces")),
        time.time_ns(),
        links=[version.lineage["traceparent"]],
        attributes={"lepton.model": "m", "lepton.version": 1},
    )
    answer(folder, asked.trace_id)
    return folder


def answer(folder: Path, trace_id: str, request_id: str = REQUEST, version: int = 1) -> None:
    log = AnswerLog(str(folder / "answers" / "m"), "m")
    log.add(
        Answer(
            request_id=request_id,
            time_us=time.time_ns() // 1000,
            version=version,
            variant="champion",
            status=200,
            trace_id=trace_id,
            latency_ms=1.5,
            rows=pa.table({"x": [[1.0, 2.0]]}),
            outputs={"output": np.zeros((1, 2), "float32")},
        )
    )
    log.close()


@pytest.fixture
def run(home: Path) -> Run:
    return load_run("r", str(home))


def told(home: Path, capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    """What a command prints, in one line."""
    assert main([*arguments, "--home", str(home)]) == status
    captured = capsys.readouterr()
    return " ".join((captured.err if status else captured.out).split())


def test_a_trace_is_found_by_run_by_id_and_by_request(
    home: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    by_name = told(home, capsys, "trace", "r")
    by_request = told(home, capsys, "trace", REQUEST)

    assert by_name == told(home, capsys, "trace", run.trace_id)
    assert f"trace {run.trace_id}" in by_name
    assert "├─ lepton.plan" in by_name
    assert ", run r, table " in by_name
    assert "linked from trace" in by_name
    assert "lepton.request" in by_request
    assert f"links to trace {run.trace_id}: lepton.checkpoint" in by_request
    assert told(home, capsys, "trace") == by_request


def test_nobody_waits_for_torch_or_ray_to_look_at_something(home: Path, tmp_path: Path) -> None:
    asked = [["runs"], ["models"], ["trace", "r"], ["why", REQUEST]]
    asked.append(["trace", "r", "--html", str(tmp_path / "trace.html")])
    script = f"""
import sys
from lepton.cli import main
assert [main([*asked, "--home", sys.argv[1]]) for asked in {asked}] == [0] * {len(asked)}
print([name for name in ("torch", "ray", "lepton.serving") if name in sys.modules])
"""
    command = [sys.executable, "-c", script, str(home)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=180)

    assert done.stdout.splitlines()[-1] == "[]"


def test_what_goes_by_no_name_is_told_how_to_find(
    home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "`lepton runs` lists the runs" in told(home, capsys, "trace", "no", status=1)
    assert "train or serve with this home first" in told(tmp_path, capsys, "trace", status=1)
    somewhere = ["trace", "r", "--perfetto", str(tmp_path / "no" / "x")]
    assert "cannot write" in told(home, capsys, *somewhere, status=1)


def test_a_request_whose_spans_are_not_here_is_told_apart(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(home, "f" * 32, "unsampled")
    answer(home, "", "untraced", version=9)

    assert "it was not sampled, or" in told(home, capsys, "trace", "unsampled", status=1)
    assert "lepton why untraced" in told(home, capsys, "trace", "untraced", status=1)
    assert main(["why", "untraced", "--home", str(home)]) == 1
    assert "has no version 9; it has: [1]" in capsys.readouterr().out


def test_writes_a_file_for_perfetto(
    home: Path, run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target = tmp_path / "trace.json"
    told(home, capsys, "trace", "r", "--perfetto", str(target))
    body = json.loads(target.read_text())
    curve = [
        e["args"]["value"] for e in body["traceEvents"] if e["ph"] == "C" and e["name"] == "loss"
    ]

    assert body["otherData"]["trace_id"] == run.trace_id
    assert {e["name"] for e in body["traceEvents"]} >= {"lepton.train", "lepton.checkpoint"}
    assert curve == run.losses


def test_writes_a_page(
    home: Path, run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target = tmp_path / "trace.html"
    told(home, capsys, "trace", "r", "--html", str(target))
    html = target.read_text()

    assert "run r" in html
    assert "rows/s" in html
    assert f"{run.losses[-1]:.4f}" in html
    assert "lepton.request (m version 1)" in html


def test_an_answer_is_followed_back_to_its_table(
    home: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    text = told(home, capsys, "why", REQUEST)
    found = json.loads(told(home, capsys, "why", REQUEST, "--json"))
    stages = {s["stage"]: s for s in found["stages"]}

    assert found["whole"]
    assert list(stages) == ["answer", "model", "checkpoint", "run", "evaluation", "table"]
    assert (stages["answer"]["status"], stages["answer"]["latency_ms"]) == (200, 1.5)
    assert stages["model"]["name"] == "m version 1"
    assert stages["checkpoint"]["where"] == run.checkpoint.uri
    assert stages["checkpoint"]["sha256"] == run.checkpoint.sha256
    assert stages["run"]["trace_id"] == run.trace_id
    assert stages["evaluation"]["accuracy"] == stages["model"]["metrics"]["accuracy"]
    assert stages["table"]["name"] == f"{home}/lake@0"
    assert (stages["table"]["files"], stages["table"]["rows"]) == (1, 60)
    for stage in found["stages"]:
        assert stage["name"] in text
        assert stage["where"] in text


def test_a_stage_that_is_gone_is_told_and_the_others_stay(
    home: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, lake = Path(run.checkpoint.uri), home / "lake"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole + b" ")
    lake.rename(home / "elsewhere")
    try:
        assert main(["why", REQUEST, "--json", "--home", str(home)]) == 1
        found = json.loads(capsys.readouterr().out)
        assert main(["why", REQUEST, "--home", str(home)]) == 1
        text = capsys.readouterr().out
    finally:
        manifest.write_bytes(whole)
        (home / "elsewhere").rename(lake)
    problems = {s["stage"]: s["problem"] for s in found["stages"]}

    assert not found["whole"]
    assert "has changed since it was registered" in problems["checkpoint"]
    assert str(lake) in problems["table"]
    assert not problems["model"] + problems["run"] + problems["evaluation"]
    assert text.count("✗") == 2


def test_an_unknown_request_is_told_what_the_log_holds(
    home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    missing = told(home, capsys, "why", "nobody", status=1)

    assert re.search(r"they hold \d of m", missing)
    assert "list them with lepton.table(" in missing
    assert "holds no inference log yet" in told(tmp_path, capsys, "why", "nobody", status=1)


def test_lists_runs_with_how_they_went(
    home: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    text = told(home, capsys, "runs")
    (row,) = json.loads(told(home, capsys, "runs", "--json"))

    assert (row["run"], row["status"], row["workers"]) == ("r", "done", [1])
    assert (row["steps"], row["planned"], row["replayed"]) == (6, 6, 0)
    assert row["loss"] == run.losses[-1]
    assert row["goodput"] == 1.0
    assert row["tables"] == [f"{home}/lake@0"]
    assert row["trace_id"] == run.trace_id
    for word in ("done", "6 of 6", "100.0%"):
        assert word in text


def test_a_run_that_cannot_be_read_hides_no_other(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = home / "runs" / "broken"
    broken.mkdir()
    (broken / "run.json").write_text('{"trace_id": ')
    try:
        found = json.loads(told(home, capsys, "runs", "--json"))
        text = told(home, capsys, "runs")
    finally:
        shutil.rmtree(broken)

    assert [(r["run"], r["status"]) for r in found] == [("broken", "unreadable"), ("r", "done")]
    assert "mend the file" in found[0]["problem"]
    assert "broken" in text


def test_lists_model_versions_with_their_roles_and_sources(
    home: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = json.loads(told(home, capsys, "models", "--json"))
    before = dict(row)
    Registry(f"{home}/registry").promote("m", 1, expect=None)
    Registry(f"{home}/registry").alias("m", "best", 1)
    text = told(home, capsys, "models")
    (row,) = json.loads(told(home, capsys, "models", "--json"))

    assert before["roles"] == before["aliases"] == []
    assert (row["roles"], row["aliases"], row["share"]) == (["champion"], ["best"], None)
    assert (row["run"], row["step"], row["checkpoint"]) == ("r", 6, run.checkpoint.uri)
    assert row["tables"] == [f"{home}/lake@0"]
    assert "champion, best" in text
    assert "r step 6" in text


def test_spans_become_rows_of_a_table_once(
    home: Path, run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    uri = str(tmp_path / "spans")
    spans = [s for s in spans_of(f"{home}/traces") if s.trace_id == run.trace_id]
    first = told(home, capsys, "trace", "r", "--to-table", uri)
    again = told(home, capsys, "trace", "r", "--to-table", uri)
    other = told(home, capsys, "trace", REQUEST, "--to-table", uri)
    rows = {r["span_id"]: r for r in lepton.table(uri).to_arrow().to_pylist()}

    assert f"@0: {len(spans)} of {len(spans)} spans added" in first
    assert f"@0: 0 of {len(spans)} spans added" in again
    assert "@1: 1 of 1 spans added" in other
    assert len(rows) == lepton.table(uri).count_rows() == len(spans) + 1
    for span in spans:
        row = rows[span.span_id]
        assert (row["name"], row["parent_id"], row["status"]) == (
            *(span.name, span.parent_id, span.status),
        )
        assert json.loads(row["attributes"]) == dict(span.attributes)
        assert row["start"].timestamp() == pytest.approx(span.start_ns / 1e9, abs=2e-6)


def test_a_table_of_something_else_is_left_alone(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = told(home, capsys, "trace", "r", "--to-table", f"{home}/lake", status=1)

    assert "is no table of spans" in message
    assert lepton.table(home / "lake").version == 0


def test_two_that_add_the_same_spans_at_once_add_them_once(home: Path, tmp_path: Path) -> None:
    spans = find_trace("r", str(home)).spans
    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(add_spans, spans, str(tmp_path / "spans")) for _ in range(2)]
        for future in done:
            future.result(timeout=180)
    ids = lepton.table(tmp_path / "spans").to_arrow()["span_id"].to_pylist()

    assert sorted(ids) == sorted(s.span_id for s in spans)
