"""Logs: each record knows its place, one file a rank, and the same by OTLP."""

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

import lepton
from lepton import telemetry
from lepton.telemetry import Carrier
from lepton.telemetry.wire import MOST_TEXT
from tests.unit.collector import Collector, attributes_of

RUN = Carrier(f"00-{'ab' * 16}-{'cd' * 8}-01")
OTHER = Carrier(f"00-{'12' * 16}-{'34' * 8}-01")

SENDING = """
import logging
from lepton import telemetry
run = telemetry.Carrier("00-" + "ab" * 16 + "-" + "cd" * 8 + "-01")
telemetry.keep_logs(run, lambda: {"lepton.run": "digits", "lepton.rank": 3})
log = logging.getLogger("lepton.some")
log.warning("%d rows are odd", 7)
log.warning("%s", "x" * 10**6)
log.warning("a collector takes no logs", extra={"about": "logs"})  # which must not become more
try:
    raise KeyError("k")
except KeyError:
    log.exception("it failed")
telemetry.flush(60_000)
"""


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[list[int]]:
    box = [0]
    end = telemetry.keep_logs(
        RUN, lambda: {"lepton.run": "digits", "lepton.rank": box[0]}, tmp_path / "logs"
    )
    yield box
    end()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_are_kept_by_rank_with_their_place(rank: list[int], tmp_path: Path) -> None:
    log = logging.getLogger("lepton.some")
    log.warning("%d rows are odd", 7)
    rank[0] = 2
    log.error("of a request", extra={"carrier": OTHER})
    try:
        raise KeyError("k")
    except KeyError:
        log.exception("it failed")
    logging.getLogger("other").warning("not ours")

    (first,) = lines(tmp_path / "logs" / "rank-0000.jsonl")
    second, third = lines(tmp_path / "logs" / "rank-0002.jsonl")
    assert first["message"] == "7 rows are odd"
    assert (first["level"], first["logger"]) == ("WARNING", "lepton.some")
    assert (first["trace_id"], first["span_id"]) == (RUN.trace_id, RUN.span_id)
    assert (first["lepton.run"], first["lepton.rank"]) == ("digits", 0)
    assert (second["trace_id"], second["span_id"]) == (OTHER.trace_id, OTHER.span_id)
    assert third["error.type"] == "KeyError"
    assert "Traceback" in third["error"]


def test_handlers_further_up_know_the_trace(
    rank: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("lepton").warning("told")

    assert [r.__dict__["trace_id"] for r in caplog.records] == [RUN.trace_id]


def test_nothing_is_kept_after_the_end(tmp_path: Path) -> None:
    end = telemetry.keep_logs(RUN, lambda: {}, tmp_path / "logs")
    logging.getLogger("lepton").warning("one")
    end()
    logging.getLogger("lepton").warning("two")

    assert [r["message"] for r in lines(tmp_path / "logs" / "rank-0000.jsonl")] == ["one"]


def test_two_runs_of_a_process_keep_what_is_said_in_their_own_threads(tmp_path: Path) -> None:
    log, both = logging.getLogger("lepton.some"), threading.Barrier(2, timeout=60)

    def run(name: str) -> None:
        end = telemetry.keep_logs(RUN, lambda: {"lepton.run": name}, tmp_path / name)
        both.wait()
        log.warning("of %s", name)
        teller = threading.Thread(target=log.warning, args=("of nobody, said by %s", name))
        teller.start()
        teller.join()
        both.wait()
        end()
        log.warning("after %s", name)

    threads = [threading.Thread(target=run, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for name, other in ("ab", "ba"):
        said = [line["message"] for line in lines(tmp_path / name / "rank-0000.jsonl")]
        assert f"of {name}" in said
        assert f"of {other}" not in said
        assert {"of nobody, said by a", "of nobody, said by b"} < {*said}


def test_a_file_that_cannot_be_written_stops_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").write_text("a file, where a folder should be")
    end = telemetry.keep_logs(RUN, lambda: {}, tmp_path / "logs")
    logging.getLogger("lepton").warning("one")
    end()

    assert "FileExistsError" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_said_once_and_what_is_logged_is_told_all_the_same(
    rank: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-0000.jsonl").symlink_to("/dev/full")
    for n in range(3):
        logging.getLogger("lepton").warning("%d rows are odd", n)

    assert capsys.readouterr().err.count("No space left on device") == 1
    told = [(r.getMessage(), r.__dict__["trace_id"]) for r in caplog.records]
    assert told == [(f"{n} rows are odd", RUN.trace_id) for n in range(3)]


def test_records_reach_a_collector() -> None:
    collector = Collector()
    command = [sys.executable, "-W", "error", "-c", SENDING]
    subprocess.run(
        command, env=collector.environment(), check=True, timeout=180, capture_output=True
    )
    collector.close()

    odd, long, failed = collector.logs()
    assert long.body.string_value == "x" * MOST_TEXT
    assert odd.body.string_value == "7 rows are odd"
    assert (odd.severity_text, odd.severity_number) == ("WARNING", 13)
    assert odd.trace_id.hex() == RUN.trace_id
    assert odd.span_id.hex() == RUN.span_id
    assert attributes_of(odd) == {"lepton.run": "digits", "lepton.rank": 3}
    assert attributes_of(failed)["exception.type"] == "KeyError"


@pytest.mark.parametrize("configured", [False, True])
def test_warnings_are_seen_as_if_nobody_kept_them(configured: bool, tmp_path: Path) -> None:
    script = f"""
import logging, pathlib
from lepton import telemetry
if {configured}:
    logging.basicConfig(format="configured: %(message)s")
for name in ("a", "b"):
    telemetry.keep_logs(telemetry.Carrier(), dict, pathlib.Path({str(tmp_path)!r}) / name)
logging.getLogger("lepton.some").warning("seven rows are odd")
logging.getLogger("lepton.some").info("and that is no news")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr == ("configured: " if configured else "") + "seven rows are odd\n"
    assert len(list(tmp_path.glob("*/rank-0000.jsonl"))) == 2


def test_what_the_loops_own_code_logs_is_the_runs_by_its_own_levels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def loop(worker: Any) -> None:
        caplog.set_level(logging.INFO, __name__)
        net = torch.nn.Linear(1, 1)
        worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
        for batch in worker.batches():
            logging.getLogger(__name__).info("a batch of %d", len(batch["x"]))
            logging.getLogger(__name__).debug("of no interest")
            logging.getLogger().warning("the root says so")
            logging.getLogger("urllib3.connectionpool").warning("chatter")
            worker.step(net(batch["x"][:, None].float()).sum())

    home = tmp_path / "home"
    stream = lepton.write(pa.table({"x": [1.0, 2.0]}), home / "t").stream(batch_size=1, lanes=1)
    lepton.train(loop, stream, name="r", home=str(home), progress=False)
    logging.getLogger(__name__).error("the run is over")
    logging.getLogger().error("for the root, too")

    said = lines(home / "runs" / "r" / "logs" / "rank-0000.jsonl")
    (run,) = [s for s in telemetry.spans_of(str(home / "traces")) if s.name == "lepton.train"]
    ours = [(s["logger"], s["message"]) for s in said if not s["logger"].startswith("lepton")]
    assert ours == 2 * [(__name__, "a batch of 1"), ("root", "the root says so")]
    assert {(s["trace_id"], s["span_id"], s["lepton.rank"]) for s in said} == {
        (run.trace_id, run.span_id, 0)
    }


def test_basic_config_works_while_a_run_keeps_logs(tmp_path: Path) -> None:
    script = f"""
import logging, pathlib
from lepton import telemetry
logs = pathlib.Path({str(tmp_path)!r})
end = telemetry.keep_logs(telemetry.Carrier({RUN.traceparent!r}), dict, logs, code="__main__")
logging.getLogger(__name__).warning("before")
logging.basicConfig(level=logging.INFO, format="%(span_id)s %(message)s")
logging.getLogger(__name__).info("after")
logging.info("by the root")
end()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert done.stderr == f"before\n{RUN.span_id} after\n{RUN.span_id} by the root\n"
    said = [line["message"] for line in lines(tmp_path / "rank-0000.jsonl")]
    assert said == ["before", "after", "by the root"]
