"""The inference log and the join with labels."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import lepton
from lepton.errors import LakeError
from lepton.monitoring import count_answers, differences, observed
from lepton.serving.answers import Answer, AnswerLog


def answer(identity: str, rows: int = 2, *, status: int = 200, version: int = 1) -> Answer:
    x = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(3.0 * rows)), 3)
    return Answer(
        request_id=identity,
        time_us=1_000_000,
        version=version,
        variant="champion",
        status=status,
        trace_id="t",
        latency_ms=float(rows),
        rows=pa.table({"x": x}) if status == 200 else None,
        outputs={"output": np.ones((rows, 2), np.float32)} if status == 200 else {},
    )


def test_every_row_of_every_answer_is_logged(tmp_path: Path) -> None:
    log = AnswerLog(f"{tmp_path}/answers/m", "m")
    for one in (answer("a"), answer("b", 1), answer("c", status=500, version=2)):
        log.add(one)
    log.close()
    rows = lepton.table(tmp_path / "answers" / "m").to_arrow()

    assert sorted(zip(rows["request_id"].to_pylist(), rows["row"].to_pylist(), strict=True)) == [
        ("a", 0),
        ("a", 1),
        ("b", 0),
        ("c", 0),
    ]
    assert count_answers("m", str(tmp_path)) == 3
    assert count_answers("m", str(tmp_path), trace_id="other") == 0
    assert observed("m", 1, 0, str(tmp_path)).requests == 2
    assert observed("m", 2, 0, str(tmp_path)).errors == 1
    assert observed("m", 1, 2_000_000, str(tmp_path)).requests == 0


def test_failures_alone_and_a_model_with_other_columns_are_logged_too(tmp_path: Path) -> None:
    log = AnswerLog(f"{tmp_path}/m", "m")
    log.add(answer("a", status=504))
    assert log.flush()
    log.add(answer("b"))
    assert log.flush()
    log.add(answer("c", status=504))
    assert log.flush()
    log.add(replace(answer("d", 1), outputs={"other": np.ones((1,), np.float32)}))
    log.close()
    rows = lepton.table(tmp_path / "m").to_arrow().to_pylist()

    found = {(r["request_id"], r["row"]): (r["answer_output"], r["answer_other"]) for r in rows}
    assert found == {
        ("a", 0): (None, None),
        ("b", 0): ([1, 1], None),
        ("b", 1): ([1, 1], None),
        ("c", 0): (None, None),
        ("d", 0): (None, 1.0),
    }


def test_an_answer_that_does_not_fit_the_table_holds_up_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = AnswerLog(f"{tmp_path}/m", "m")
    log.add(answer("a"))
    assert log.flush()
    log.add(replace(answer("bad"), outputs={"output": np.array([["no"]] * 2)}))
    log.add(answer("good"))
    assert not log.flush()
    log.close()

    assert "1 answers wait" in caplog.text
    rows = lepton.table(tmp_path / "m").to_arrow()["request_id"].to_pylist()
    assert set(rows) == {"a", "good"}


def test_a_failed_commit_is_tried_again(tmp_path: Path) -> None:
    in_the_way = tmp_path / "m"
    in_the_way.write_text("a file where the table should be")
    log = AnswerLog(str(in_the_way), "m")
    log.add(answer("a"))
    log.flush()
    in_the_way.unlink()
    log.close()

    assert lepton.table(in_the_way).count_rows() == 2


def test_labels_join_once_and_a_correction_replaces(tmp_path: Path) -> None:
    home = str(tmp_path)
    log = AnswerLog(f"{home}/answers/m", "m")
    for one in (answer("a"), answer("b", 1), answer("c", status=500)):
        log.add(one)
    log.close()
    labels = tmp_path / "labels"
    lepton.write(
        pa.table({"request_id": ["a", "a", "z"], "row": [0, 1, 0], "y": [1, 2, 3]}), labels
    )
    first = lepton.feedback("m", labels=labels, home=home)
    lepton.write(pa.table({"request_id": ["a"], "row": [1], "y": [7]}), labels)
    second = lepton.feedback("m", labels=labels, home=home)

    assert sorted(first.to_arrow()["y"].to_pylist()) == [1, 2]
    assert sorted(second.to_arrow()["y"].to_pylist()) == [1, 7]
    assert {"x", "answer_output", "y", "version"} <= set(second.schema.names)
    with pytest.raises(LakeError, match="no column request_id"):
        lepton.feedback("m", labels=lepton.write(pa.table({"q": [1]}), tmp_path / "l2"), home=home)
    with pytest.raises(LakeError, match="no inference log"):
        lepton.feedback("unknown", labels=labels, home=home)


def test_a_log_that_is_not_there_is_no_answer_but_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    home = str(tmp_path)
    assert observed("m", 1, 0, home).requests == 0
    log = AnswerLog(f"{tmp_path}/answers/m", "m")
    log.add(answer("a"))
    log.close()
    assert observed("m", 1, 0, home).requests == 1
    (entry,) = (tmp_path / "answers/m/_delta_log").glob("*0.json")
    entry.write_text("{")
    with pytest.raises(LakeError, match="answers/m"):
        observed("m", 1, 0, home)
    with pytest.raises(LakeError, match="answers/m"):
        differences("m", (1, 2), 0, home)


def test_a_client_that_had_no_time_is_nobodys_failure(tmp_path: Path) -> None:
    log = AnswerLog(f"{tmp_path}/answers/m", "m")
    log.add(answer("a"))
    log.add(replace(answer("b", status=504), latency_ms=4.0))
    log.add(replace(answer("c", status=504), latency_ms=50.0))
    log.add(answer("d", status=500))
    log.close()
    counts = observed("m", 1, 0, str(tmp_path), patient_ms=10)
    assert (counts.requests, counts.errors, counts.given_up) == (3, 2, 1)
    assert counts.p99_ms > 40
    every = observed("m", 1, 0, str(tmp_path))
    assert (every.requests, every.errors, every.given_up) == (4, 3, 0)
    none = observed("m", 1, 0, str(tmp_path), patient_ms=1e9)
    assert (none.requests, none.errors, none.given_up) == (2, 1, 2)
