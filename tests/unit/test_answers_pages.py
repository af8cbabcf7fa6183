"""Answers that came as arrays: kept side by side until they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lepton
from lepton.serving import answers, pages
from lepton.serving.answers import Answer, AnswerLog
from lepton.serving.arrays import Arrays


def answer(identity: str, rows: int, seed: int = 0, **outputs: Any) -> Answer:
    random = np.random.default_rng(seed)
    x = random.random((rows, 3)).astype(np.float32)
    n = random.integers(0, 2**60, rows)
    return Answer(
        request_id=identity,
        time_us=1_000_000 + seed,
        version=1,
        variant="champion",
        status=200,
        trace_id="t",
        latency_ms=float(rows),
        rows=Arrays({"x": x, "n": n}, rows, "", False, x.nbytes + n.nbytes),
        outputs=outputs or {"output": random.random((rows, 2, 2))},
    )


def told(one: Answer) -> list[Any]:
    """The rows that an answer has to leave."""
    assert isinstance(one.rows, Arrays)
    rows, (output, *_) = one.rows.columns, one.outputs.values()
    flat = output.reshape(len(output), -1) if output.ndim > 1 else output
    count = one.rows.count
    return [
        (one.request_id, i, rows["x"][i].tolist(), int(rows["n"][i]), flat[i].tolist())
        for i in range(count)
    ]


def logged(folder: Path, output: str = "answer_output") -> list[Any]:
    found = lepton.table(folder).to_arrow().sort_by([("time", "ascending"), ("row", "ascending")])
    names = ("request_id", "row", "x", "n", output)
    return list(zip(*(found[name].to_pylist() for name in names), strict=True))


@pytest.mark.parametrize("page_bytes", [1, 500, 2**20])
def test_rows_arrive_as_they_were_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page_bytes: int
) -> None:
    monkeypatch.setattr(pages, "PAGE_BYTES", page_bytes)
    log = AnswerLog(f"{tmp_path}/m", "m")
    wanted: list[Any] = []
    for seed, rows in enumerate([1, 1, 7, 64, 1, 30, 2]):
        one = answer(f"r{seed}", rows, seed)
        wanted += told(one)
        assert isinstance(one.rows, Arrays)
        mine = one.rows.columns["x"]
        log.add(one)
        mine[:] = 0  # whoever asked may use its memory for something else
        if seed == 3:
            assert log.flush()
    log.close()
    assert logged(tmp_path / "m") == wanted


def test_other_forms_and_arrays_in_other_order_in_memory(tmp_path: Path) -> None:
    log = AnswerLog(f"{tmp_path}/m", "m")
    turned = np.asfortranarray(np.arange(8.0).reshape(4, 2))
    for seed, output in enumerate([turned, turned[::2], turned[:, 0], turned.astype("f4")]):
        one = answer(f"r{seed}", len(output), seed, **{f"o{seed}": output})
        wanted = told(one)
        log.add(one)
        assert log.flush()
        mine = [row for row in logged(tmp_path / "m", f"answer_o{seed}") if row[0] == f"r{seed}"]
        assert mine == wanted
    log.close()


def test_what_no_page_takes_is_kept_as_a_table(tmp_path: Path) -> None:
    log = AnswerLog(f"{tmp_path}/m", "m")
    log.add(answer("one", 1))
    log.add(answer("none", 0))  # of the same form as what has a page
    log.add(answer("words", 2, o=np.array(["a", "b"])))
    for odd in (">f4", "?"):  # of another machine's order; and a type that a page takes
        log.add(answer("one", 1, o=np.ones(1, odd)))
        assert (log._waiting[-1].place is None) == (odd == ">f4")
        log._waiting.pop()
    log.close()
    found = lepton.table(tmp_path / "m").to_arrow()
    assert sorted(found["request_id"].to_pylist()) == ["one", "words", "words"]
    assert set(found["answer_o"].to_pylist()) == {None, "a", "b"}


def test_outputs_that_are_not_a_row_each_harm_no_request_and_no_other_answer(
    tmp_path: Path,
) -> None:
    log = AnswerLog(f"{tmp_path}/m", "m")
    one, other = answer("one", 1, o=np.ones(1)), answer("two", 2, 1, o=np.ones(2))
    wanted = told(one) + told(other)
    log.add(one)
    log.add(answer("odd", 2, o=np.ones(1)))  # of the same form
    log.add(other)
    assert not log.flush()
    assert [a.request_id for a in log._waiting] == ["odd"]
    log.close()
    assert logged(tmp_path / "m", "answer_o") == wanted


def test_the_oldest_go_and_the_rest_arrives_when_the_lake_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "PAGE_BYTES", 500)
    monkeypatch.setattr(answers, "MOST_ANSWERS", 5)
    in_the_way = tmp_path / "m"
    in_the_way.write_text("a file where the table should be")
    log = AnswerLog(str(in_the_way), "m")
    every = [answer(f"r{seed}", 3, seed) for seed in range(9)]
    wanted = [row for one in every[-5:] for row in told(one)]
    for at, one in enumerate(every):
        log.add(one)
        if at == 3:
            assert not log.flush()
    assert log.dropped == 4
    assert log._bytes == sum(a.size for a in log._waiting)
    in_the_way.unlink()
    log.close()
    assert logged(in_the_way) == wanted
