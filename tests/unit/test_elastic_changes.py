"""What the benchmark of changes reads from the workers' records."""

from pathlib import Path

from benchmarks.elastic_changes import Cost, cost_of, settled
from benchmarks.elastic_records import Made, Records

S = 10**9


def made(steps: range, at: float, every: float, *pids: int) -> list[Made]:
    return [
        Made(step, int((at + i * every) * S) + pid, pid)
        for i, step in enumerate(steps)
        for pid in pids
    ]


def test_a_pause_and_who_takes_part_again() -> None:
    records = made(range(1, 11), 0, 1, 1, 2) + made(range(11, 21), 13, 1, 1, 2, 3)

    assert cost_of(records, 9 * S + S // 2, 3) == Cost(3.5 + 1e-9, 0, 3.5 + 1e-9)
    assert cost_of(records, 9 * S + S // 2, 4).full is None


def test_steps_made_again_are_counted_once_each() -> None:
    records = made(range(1, 11), 0, 1, 1, 2) + made(range(6, 21), 20, 1, 3, 4)
    cost = cost_of(records, 9 * S + S // 2, 2)

    assert cost.again == 5
    assert cost.pause == 25 - 9.5 + 3e-9


def test_without_a_new_step_nothing_is_known() -> None:
    assert cost_of(made(range(1, 5), 0, 1, 1), 9 * S, 1) == Cost(None, 0, None)
    assert not settled([], 2, 1.0)


def test_records_are_read_once_and_whole(tmp_path: Path) -> None:
    records, path = Records(tmp_path), tmp_path / "1.steps"
    path.write_text("1 10 7\n2 20")

    assert records.all() == [Made(1, 10, 7)]

    path.write_text("1 10 7\n2 20 7\n")
    (tmp_path / "2.steps").write_text("1 15 8\n")

    assert records.all() == [Made(1, 10, 7), Made(1, 15, 8), Made(2, 20, 7)]
    assert records.all() == records.all()
    assert (records.furthest(19), records.furthest(20)) == (1, 2)
