"""``lepton demo``: a table becomes a served model, a worker is killed, nothing is lost.

Everything here is done with the public functions; this file only puts them in order and says what
happened in one line a stage.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lepton import cluster, telemetry
from lepton.checkpoints import Manifest
from lepton.errors import LeptonError
from lepton.lake import Snapshot
from lepton.monitoring import count_answers
from lepton.pipeline.digits import loop, write_digits
from lepton.pipeline.killer import Kill, kill_one_worker
from lepton.pipeline.page import write_page
from lepton.pipeline.traffic import Traffic
from lepton.preprocess import Preparation
from lepton.promotion import CanaryRule, promote
from lepton.registry import ModelVersion, Registry
from lepton.serving import App
from lepton.serving.app import leave
from lepton.serving.protocol import request_of
from lepton.stream import Stream
from lepton.telemetry import Carrier
from lepton.training import Evaluation, Run, evaluate, register, train
from lepton.training.trainer import run_folder

MODEL = "digits"
GATE = "accuracy >= 0.9662"
BATCH, EPOCHS, EVERY, KILL_AFTER = 128, 16, 12, 91
REQUESTS = 300


class StageError(LeptonError):
    """A stage of the demo failed; the message names it."""


@dataclass
class Demo:
    """What the demo did, stage by stage.

    Attributes:
        out: the folder of everything it wrote.
        trace_id: the one trace.
        figures: stage to what it shows, in order.
        report: path of the page.
    """

    out: Path
    console: Console
    trace_id: str = ""
    report: Path | None = None
    figures: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])

    def say(self, stage: str, text: str, **figures: str) -> None:
        """Print one line and keep its figures for the page."""
        self.figures.setdefault(stage, {}).update(figures)
        self.console.print(f"[bold cyan]{stage:<9}[/] {text}", highlight=False, soft_wrap=True)


def demo(
    out: str | Path = "lepton-demo", *, keep: bool = False, console: Console | None = None
) -> Demo:
    """Run the loop on the handwritten digits; a second run into ``out`` makes the next versions.

    Args:
        out: where everything goes; it is the home of this demo.
        keep: leave the service running and print a request that works.
        console: where to print; default standard output.

    Raises:
        StageError: a stage failed; no process is left behind.
        KeyboardInterrupt: interrupted; likewise.
    """
    home = Path(out).absolute()
    home.mkdir(parents=True, exist_ok=True)
    shown = Demo(home, console or Console())
    holder = cluster.hold(home) if keep else None
    finished = False
    try:
        with telemetry.span("lepton.demo", Carrier("", str(home / "traces"))) as span:
            shown.trace_id = span.carrier.trace_id
            _run(shown, span.carrier, keep)
        with _stage(shown, "report"):
            shown.report = write_page(shown)
            shown.say("report", f"one trace {shown.trace_id}, {_short(shown.report)}")
        finished = True
    finally:
        telemetry.flush()
        leave()
        cluster.disconnect()
        if holder is not None and not finished:
            holder.terminate()
            holder.wait()
    if holder is not None:
        shown.say("keep", f"the service stays up; stop it with: kill {holder.pid}")
    return shown


def _run(shown: Demo, trace: Carrier, keep: bool) -> None:
    home = str(shown.out)
    with _stage(shown, "table"):
        data = _table(shown, trace)
    with _stage(shown, "train", spin=False):  # train() shows a bar of its own
        cluster.connect(log_to_driver=False)
        run, stream = _train(shown, data, trace)
    with _stage(shown, "evaluate"):
        weak, judged, found = _evaluate(shown, run, data, trace)
    with _stage(shown, "register"):
        earlier, candidate = _register(shown, run, weak, judged, found, trace)
    with _stage(shown, "promote"):
        first = promote(earlier, replicas=(1, 4), port=None, home=home, trace=trace)
        with (
            telemetry.span("lepton.use", trace) as using,
            Traffic(first, _test(data).to_arrow(), using.carrier) as traffic,
        ):
            app = _promote(shown, candidate, trace)
            with _stage(shown, "use", spin=False):
                traffic.wait_for(max(REQUESTS, traffic.sent + REQUESTS // 3))
    with _stage(shown, "use"):
        _use(shown, app, traffic)
        _samples(shown, traffic, _test(data), judged, run, stream)
        if keep:
            _print_request(shown, app, _test(data))
        else:
            app.close()


def _table(shown: Demo, trace: Carrier) -> Snapshot:
    with telemetry.span("lepton.table", trace) as span:
        data = write_digits(str(shown.out / "lake" / MODEL))
        train_rows, test_rows = _train_rows(data).count_rows(), _test(data).count_rows()
        span.set(lepton_table=str(data), lepton_rows=train_rows + test_rows)
    shown.say(
        "table",
        f"{_short(Path(data.uri))}@{data.version}: {train_rows + test_rows} digits, {train_rows} "
        f"to train and {test_rows} to test, split by a hash of the id",
        table=f"{MODEL}@{data.version}",
        train=str(train_rows),
        test=str(test_rows),
    )
    return data


def _train(shown: Demo, data: Snapshot, trace: Carrier) -> tuple[Run, Stream]:
    rows = _train_rows(data)
    stream = rows.stream(
        batch_size=BATCH,
        epochs=EPOCHS,
        columns=["pixels", "label"],
        lanes=2,
        engine="ray_data",
        transform=Preparation.fit(rows, minmax=["pixels"]),
    )
    home, name = str(shown.out), f"{MODEL}-{data.version}"
    folder = run_folder(name, home)
    with cluster.hushed(), kill_one_worker(folder, after_step=KILL_AFTER) as kill:
        run = train(
            loop,
            stream,
            name=name,
            workers=(1, 2),
            home=home,
            checkpoint_every=EVERY,
            audit=True,
            trace=trace,
        )
    _tell_training(shown, run, stream, kill)
    return run, stream


def _tell_training(shown: Demo, run: Run, stream: Stream, kill: Kill) -> None:
    used = run.consumption(stream)
    killed = next((p for p in run.pauses if p.step >= kill.step), None)
    if not used.exact or kill.pid == 0 or killed is None:
        raise LeptonError(
            f"training was to survive a kill with every row exactly once: {used}, killed {kill}, "
            f"changes of the workers: {run.pauses}"
        )
    shown.say(
        "train",
        f"{run.steps} steps of {BATCH} rows, {EPOCHS} epochs, 2 workers fed by Ray Data; worker "
        f"{kill.rank} killed (SIGKILL) after step {killed.step}, the next step made "
        f"{killed.seconds:.2f} s later (workers: {killed.after})",
        steps=str(run.steps),
        kills="1 (SIGKILL)",
    )
    shown.say(
        "",
        f"rows lost {used.lost}, repeated {used.repeated} of {used.rows}; order hash "
        f"{used.order_hash[:12]} {'=' if used.exact else '≠'} the plan's; "
        f"steps replayed {run.replayed}",
    )
    shown.figures["train"] |= {
        "rows lost": str(used.lost),
        "rows repeated": str(used.repeated),
        "steps replayed": str(run.replayed),
    }
    shown.figures.pop("", None)


def _evaluate(
    shown: Demo, run: Run, data: Snapshot, trace: Carrier
) -> tuple[Manifest, Evaluation, Evaluation]:
    weak = run.checkpoints[0]
    home = str(shown.out)
    judged = evaluate(run, _test(data), label="label", home=home, trace=trace)
    early = evaluate(weak, _test(data), label="label", home=home, trace=trace)
    m = judged.metrics
    shown.say(
        "evaluate",
        f"accuracy {m['accuracy']:.4f}, precision {m['precision']:.4f}, recall {m['recall']:.4f}, "
        f"F1 {m['f1']:.4f} on {judged.rows} rows "
        f"(step {weak.step}: {early.metrics['accuracy']:.4f})",
        **{name: f"{value:.4f}" for name, value in m.items()},
    )
    return weak, judged, early


def _register(
    shown: Demo,
    run: Run,
    weak: Manifest,
    judged: Evaluation,
    early: Evaluation,
    trace: Carrier,
) -> tuple[ModelVersion, ModelVersion]:
    home = str(shown.out)
    registry = Registry(f"{home}/registry")
    champion = registry.state(MODEL).pointer.champion
    if champion is None:
        earlier = register(
            run, MODEL, metrics=early.metrics, checkpoint=weak, home=home, trace=trace
        )
    else:
        earlier = registry.version(MODEL, champion)
    candidate = register(run, MODEL, metrics=judged.metrics, home=home, trace=trace)
    shown.say(
        "register",
        f"{MODEL} version {candidate.version} from {_short(Path(candidate.checkpoint))}; the "
        f"earlier champion is version {earlier.version}",
        version=str(candidate.version),
        earlier=str(earlier.version),
    )
    return earlier, candidate


def _promote(shown: Demo, candidate: ModelVersion, trace: Carrier) -> App:
    changes: list[str] = []
    app = promote(
        candidate,
        gate=GATE,
        canary=0.1,
        rule=CanaryRule(bake_s=3, min_requests=15),
        home=str(shown.out),
        trace=trace,
        on_change=changes.append,
    )
    shown.say(
        "promote",
        f"gate {GATE} passed; {', then '.join(changes)}; {app.url}",
        gate=GATE,
        canary="10 %",
        champion=str(candidate.version),
    )
    return app


def _use(shown: Demo, app: App, traffic: Traffic) -> None:
    logged = _wait_for_log(shown, app.model, traffic.sent - traffic.failed)
    p50, p99 = np.percentile(traffic.latencies_ms, [50, 99])
    by = ", ".join(f"version {v}: {n}" for v, n in sorted(traffic.versions.items()))
    shown.say(
        "use",
        f"{traffic.sent} requests, {traffic.failed} failed ({by}); p50 {p50:.1f} ms, p99 {p99:.1f} "
        f"ms; {logged} logged in {_short(shown.out / 'answers' / MODEL)}",
        requests=str(traffic.sent),
        failed=str(traffic.failed),
        p99=f"{p99:.1f} ms",
        logged=str(logged),
    )
    if traffic.failed:
        raise LeptonError(f"{traffic.failed} requests failed, such as: {traffic.errors}")


def _wait_for_log(shown: Demo, model: str, requests: int, patience_s: float = 30) -> int:
    """Wait until the inference log holds this demo's answers; return how many it holds."""
    end = time.monotonic() + patience_s
    while (found := count_answers(model, str(shown.out), trace_id=shown.trace_id)) < requests:
        if time.monotonic() > end:
            raise LeptonError(f"{requests} requests were answered, {found} of them logged")
        time.sleep(0.1)
    return found


def _samples(
    shown: Demo,
    traffic: Traffic,
    test: Snapshot,
    judged: Evaluation,
    run: Run,
    stream: Stream,
) -> None:
    """Keep what the page needs beside the figures."""
    rows = test.to_arrow()
    version = max(traffic.versions, key=int)
    picked = [i for i, answer in sorted(traffic.answers.items()) if answer[2] == version][:24]
    body: dict[str, Any] = {
        "run": run.name,
        "steps": stream.steps,
        "confusion": judged.confusion.tolist(),
        "samples": [
            {
                "pixels": rows["pixels"][i].as_py(),
                "label": rows["label"][i].as_py(),
                "answer": traffic.answers[i][0],
                "score": traffic.answers[i][1],
            }
            for i in picked
        ],
    }
    (shown.out / "demo.json").write_text(json.dumps(body))


def _print_request(shown: Demo, app: App, test: Snapshot) -> None:
    row = test.select(["pixels"]).head(1)
    body = request_of(row, [{"name": "pixels", "shape": [-1, 64], "datatype": "FP32"}])
    path = shown.out / "request.json"
    path.write_bytes(body)
    shown.say("keep", f"curl -s {app.infer_url} -d @{shlex.quote(str(path))}")


def _train_rows(data: Snapshot) -> Snapshot:
    return data.where("split = 'train'")


def _test(data: Snapshot) -> Snapshot:
    return data.where("split = 'test'")


def _short(path: Path) -> str:
    """The path from here, where that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


@contextmanager
def _stage(shown: Demo, name: str, *, spin: bool = True) -> Generator[None]:
    """Name the stage in whatever goes wrong inside it, and show that it is under way."""
    status = shown.console.status(f"{name} …") if spin else None
    if status is not None:
        status.start()
    try:
        yield
    except StageError:
        raise
    except KeyboardInterrupt:
        shown.console.print(f"[bold red]interrupted[/] during stage {name!r}")
        raise
    except Exception as e:
        raise StageError(f"stage {name!r} failed: {e}") from e
    finally:
        if status is not None:
            status.stop()
