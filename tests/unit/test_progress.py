"""What a run says of itself while it goes on."""

import io
import json
from pathlib import Path

from rich.console import Console

from lepton.training.evaluations import Judged
from lepton.training.progress import Line, described, newest_step
from lepton.training.rendezvous import Event


def event(kind: str, size: int = 2, *, who: str = "node-1-ab", at: float = 0.0) -> Event:
    return Event(kind=kind, who=who, world_size=size, step=91, time_ns=int(at * 1e9))


def test_only_what_is_out_of_the_ordinary_is_told_and_once() -> None:
    out = io.StringIO()
    line = Line("digits", 100, 64, Console(file=out, width=120))
    events = [event("began"), event("joined", at=1), event("lost", at=2)]
    line.tell(events)
    line.tell([*events, event("joined", who="node-2-cd", at=2.4), event("left", 1, at=3)])

    assert out.getvalue().splitlines() == [
        "run digits: worker node-1-ab joined after step 91, 2 train",
        "run digits: worker node-1-ab lost after step 91",
        "run digits: worker node-2-cd joined after step 91, in place of node-1-ab 0.4 s after its "
        "loss, 2 train",
        "run digits: worker node-1-ab left after step 91, its node goes away",
    ]
    assert described(event("finished")) == ""


def test_the_line_has_the_rate_once_there_is_one() -> None:
    line = Line("digits", 100, 64, None)
    first = line.text(10, 0.5, 2)
    assert first == "step 10/100  loss 0.5000  2 workers"
    later = line.text(60, 0.25, 1)
    assert "rows/s  1 workers" in later
    assert later.endswith("s left")


def test_the_newest_step_is_the_last_that_was_made(tmp_path: Path) -> None:
    logs = tmp_path / "steps"
    logs.mkdir()
    assert newest_step(tmp_path) is None
    made = [json.dumps({"made": n, "loss": 1 / n, "time_ns": n}) for n in (1, 2)]
    (logs / "0000-0000.jsonl").write_text("\n".join(s.replace(" ", "") for s in made) + "\n")
    (logs / "0001-0000.jsonl").write_text('{"step":3,"rows":1}\n')

    assert newest_step(tmp_path) == (2, 0.5)


def test_the_line_has_the_first_figure_of_the_last_evaluation() -> None:
    line = Line("digits", 100, 64, None)
    judged = Judged(
        step=10,
        epoch=0,
        rows=5,
        metrics={"accuracy": 0.75, "f1": 0.5},
        confusion=None,
        seconds=0.1,
        world_size=2,
        time_ns=0,
        table="t@0",
    )

    assert line.text(10, 0.5, 2, judged) == "step 10/100  loss 0.5000  accuracy 0.7500  2 workers"
