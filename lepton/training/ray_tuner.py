"""``lepton.tune``: Ray Tune chooses configurations, each trial is a run of lepton's own.

What a trial has found is read from its run's folder, not from Ray Tune, which decides about
configurations, places trials, stops the hopeless ones and tries lost ones again. A trial keeps its
name over all of that, so its run goes on from its newest checkpoint.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import ray
from ray import tune as ray_tune

from lepton import cluster
from lepton.errors import TrainingError
from lepton.lake import home_of
from lepton.stream import Mixture, Stream
from lepton.telemetry import Carrier, name_process
from lepton.training import evaluations
from lepton.training.evaluations import Judged
from lepton.training.run import Run, load_run
from lepton.training.stopping import EarlyStopping
from lepton.training.study import judged_of, study
from lepton.training.trainer import train
from lepton.training.validation import Validation

if TYPE_CHECKING:
    from lepton.training.worker import Worker

TunedLoop = Callable[["Worker", Mapping[str, Any]], None]
Rows = Stream | Mixture
POLL_S = 0.1
FOREVER = 2**31
"""Patience of a trial that is not to stop by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One configuration and its run.

    Attributes:
        run: its run; ``run.best`` is its best checkpoint.
        config: what the loop was given.
        judged: its best evaluation.
        error: why it did not come to its end, or empty.
    """

    run: Run
    config: Mapping[str, Any]
    judged: Judged
    error: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """What a search has found.

    Attributes:
        name: of the search.
        metric: the figure searched for.
        trials: those that were judged at all, best first.
        trace_id: the trace that all of them belong to.
    """

    name: str
    metric: str
    trials: tuple[Trial, ...]
    trace_id: str

    @property
    def best(self) -> Trial:
        """The best trial; register it with ``lepton.register(best.run, checkpoint=best.run.best)``.

        Raises:
            TrainingError: no trial was judged.
        """
        if not self.trials:
            raise TrainingError(f"search {self.name!r} has no trial with an evaluation")
        return self.trials[0]

    @property
    def table(self) -> pa.Table:
        """A row for each trial, best first: ``run``, ``step``, the configuration, the figures."""
        return pa.Table.from_pylist(
            [
                {
                    "run": t.run.name,
                    "step": t.judged.step,
                    **{f"config.{k}": v for k, v in t.config.items()},
                    **t.judged.metrics,
                    "error": t.error,
                }
                for t in self.trials
            ]
        )


def tune(  # noqa: PLR0913 - what to search, how, and where
    loop: TunedLoop,
    stream: Rows | Callable[[Mapping[str, Any]], Rows],
    *,
    name: str,
    space: Mapping[str, Any],
    validate: Validation,
    metric: str,
    mode: Literal["max", "min"] = "max",
    patience: int | None = None,
    trials: int = 1,
    concurrent: int | None = None,
    search: Any = None,
    scheduler: Any = None,
    workers: int | tuple[int, int] = 1,
    resources: Mapping[str, float] | None = None,
    retries: int = 3,
    home: str | None = None,
    trace: Carrier | None = None,
    **options: Any,
) -> Tuning:
    """Search a configuration with Ray Tune: each trial is a run named ``<name>-<trial's id>``.

    Calling it again by the same name goes on: finished trials are taken as they are.

    Args:
        loop: a person's torch code, a function of the worker and a configuration.
        stream: the rows, or a function from a configuration to them.
        name: of the search.
        space: configuration values, and Ray Tune's ``tune.grid_search``, ``tune.uniform``, …
        validate: how to judge.
        metric: the figure to search for, of ``validate``.
        mode: whether ``"max"`` or ``"min"`` is better.
        patience: evaluations without a better one after which a trial ends; default never.
        trials: samples of the space (of each point of a grid).
        concurrent: trials at once at the most; default what there is room for.
        search: a search algorithm of Ray Tune's; default random and grid.
        scheduler: of Ray Tune's, such as ASHA, to end hopeless trials; it counts evaluations.
        workers: of each trial, as for :func:`lepton.train`; 1 trains in the trial's process.
        resources: of each worker; default one CPU, and one GPU if the cluster has any.
        retries: how often a trial whose process was lost goes on.
        home: where runs and studies are kept.
        trace: the span to run under; default a new trace.
        options: of :func:`lepton.train`, for each run.

    Raises:
        ValueError: there is no such figure.
        TrainingError: every trial failed, or the name belongs to another study.
    """
    rule = EarlyStopping(metric, mode=mode, patience=patience or FOREVER)
    if not callable(stream) or isinstance(stream, Stream):
        validate.settled(stream).check(rule)
    asked = {"table": str(validate.snapshot), "label": validate.label, "metric": metric}
    root = home_of(home)
    cluster.connect()
    with study("lepton.tune", name, {**asked, "mode": mode}, home, trace) as under:
        given = {**options, "validate": validate, "stop": rule, "home": root, "trace": under}
        body = partial(_trial, loop, stream, name, {**given, **_placed(workers, resources)})
        tuner = _tuner(
            ray_tune.with_resources(body, _own(workers, resources)),
            Path(root) / "studies",
            name,
            dict(space),
            ray_tune.TuneConfig(
                metric=metric,
                mode=mode,
                num_samples=trials,
                max_concurrent_trials=concurrent,
                search_alg=search,
                scheduler=scheduler,
                trial_dirname_creator=_folder_name,
            ),
            retries,
        )
        errors = {Path(r.path).name: r.error for r in tuner.fit() if r.error is not None}
    found = _found(name, root, rule, errors)
    if errors and not found:
        raise TrainingError(f"every trial of {name!r} failed: {next(iter(errors.values()))}")
    return Tuning(name=name, metric=metric, trials=found, trace_id=under.trace_id)


def _tuner(body: Any, folder: Path, name: str, space: Any, config: Any, retries: int) -> Any:
    """Return a search that begins, or one that goes on where it was left."""
    path = str(folder / name)
    if ray_tune.Tuner.can_restore(path):
        return ray_tune.Tuner.restore(path, body, resume_errored=True, param_space=space)
    run = ray_tune.RunConfig(
        name=name,
        storage_path=str(folder),
        failure_config=ray_tune.FailureConfig(max_failures=retries),
        verbose=0,
    )
    return ray_tune.Tuner(body, param_space=space, tune_config=config, run_config=run)


def _folder_name(trial: Any) -> str:
    return str(trial.trial_id)


def _placed(workers: int | tuple[int, int], resources: Mapping[str, float] | None) -> Any:
    """What a trial's call of train() is told of its workers."""
    return {"workers": workers} if workers == 1 else {"workers": workers, "resources": resources}


def _own(workers: int | tuple[int, int], resources: Mapping[str, float] | None) -> Any:
    """What a trial's own process needs: nothing worth counting if others do the work."""
    if workers != 1:
        return {"CPU": 0.01}  # Tune wants something
    gpu = {"GPU": 1} if ray.cluster_resources().get("GPU") else {}
    return dict(resources) if resources is not None else {"CPU": 1, **gpu}


def _trial(
    loop: TunedLoop, stream: Any, name: str, options: Mapping[str, Any], config: dict[str, Any]
) -> None:
    """The function that Ray Tune runs: train, and tell of each evaluation meanwhile."""
    trial = str(ray_tune.get_context().get_trial_id())
    name_process(f"trial {trial}")
    run_name = f"{name}-{trial}"
    folder = Path(options["home"]) / "runs" / run_name
    folder.mkdir(parents=True, exist_ok=True)
    told = {"study": name, "trial": trial, "config": config}
    (folder / "trial.tmp").write_text(json.dumps(told, default=str))
    (folder / "trial.tmp").replace(folder / "trial.json")
    rows: Any = stream(config) if callable(stream) and not isinstance(stream, Stream) else stream
    call = partial(
        train, partial(_configured, loop, config), rows, name=run_name, progress=False, **options
    )
    wait = _in_a_thread(call) if options["workers"] == 1 else _in_a_task(call, f"trial {trial}")
    last = 0
    over = False
    while not over:
        over = wait(POLL_S)
        for judged in evaluations.read(folder):
            if judged.step > last:
                last = judged.step
                ray_tune.report({**judged.metrics, "step": judged.step})


def _in_a_thread(call: Callable[[], Any]) -> Callable[[float], bool]:
    """Begin a call; return what waits some seconds and says whether it is over, or raises."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            call()
        except BaseException as e:  # noqa: BLE001 - raised in the thread that Tune watches
            failed.append(e)

    thread = threading.Thread(target=work, name="lepton-trial", daemon=True)
    thread.start()

    def wait(seconds: float) -> bool:
        thread.join(seconds)
        if failed:
            raise failed[0]
        return not thread.is_alive()

    return wait


def _in_a_task(call: Callable[[], Any], title: str) -> Callable[[float], bool]:
    """As :func:`_in_a_thread`, outside of the trial's placement group: its workers need room."""
    task: Any = ray.remote(_run)
    apart = task.options(num_cpus=0, scheduling_strategy="DEFAULT", max_retries=0)
    running = apart.remote(call, title)

    def wait(seconds: float) -> bool:
        over: list[Any] = ray.wait([running], timeout=seconds)[0]
        if over:
            ray.get(running)
        return bool(over)

    return wait


def _run(call: Callable[[], Any], title: str) -> None:
    name_process(title)
    call()


def _configured(loop: TunedLoop, config: Mapping[str, Any], worker: Worker) -> None:
    loop(worker, config)


def _found(
    name: str, home: str, rule: EarlyStopping, errors: Mapping[str, Any]
) -> tuple[Trial, ...]:
    """Return the trials that were judged, best first."""
    trials: list[Trial] = []
    for path in sorted((Path(home) / "runs").glob(f"{name}-*/trial.json")):
        told: dict[str, Any] = json.loads(path.read_text())
        if told["study"] != name or not evaluations.read(path.parent):
            continue
        run = load_run(path.parent.name, home)
        error = str(errors.get(told["trial"], "")).strip()
        best = judged_of(run, rule)
        trials.append(Trial(run=run, config=told["config"], judged=best, error=error))

    def worse(trial: Trial) -> float:
        figure = trial.judged.metrics.get(rule.metric, math.nan)
        return math.inf if math.isnan(figure) else -figure if rule.mode == "max" else figure

    return tuple(sorted(trials, key=worse))
