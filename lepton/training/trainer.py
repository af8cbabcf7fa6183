"""``lepton.train``: checks everything first, then runs a person's loop on every worker."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton import telemetry
from lepton.checkpoints import latest
from lepton.cluster import bounds_of
from lepton.errors import StreamError, TrainingError
from lepton.stream import Mixture, Stream
from lepton.telemetry import Carrier
from lepton.training.board import folder_of
from lepton.training.planner import outcome_of
from lepton.training.progress import watch
from lepton.training.run import Run, load_run, run_folder
from lepton.training.stopping import EarlyStopping
from lepton.training.validation import Settled, Validation

if TYPE_CHECKING:
    from lepton.training.plan import Plan
    from lepton.training.worker import Worker

Loop = Callable[["Worker"], None]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_PACKAGES = ("lepton", "torch", "ray", "pyarrow", "deltalake")


def train(  # noqa: PLR0913 - the one place for what a run can be told
    loop: Loop,
    stream: Stream | Mixture,
    *,
    name: str,
    workers: int | tuple[int, int] = 1,
    home: str | None = None,
    checkpoint_every: int = 100,
    keep: int | None = None,
    keep_best: int = 1,
    checkpoints: str | None = None,
    storage_options: Mapping[str, str] | None = None,
    max_failures: int = 3,
    hang_timeout_s: float = 15.0,
    start_timeout_s: float | None = None,
    resources: Mapping[str, float] | None = None,
    audit: bool = False,
    exact: bool = False,
    validate: Validation | None = None,
    stop: EarlyStopping | None = None,
    tensorboard: bool | str | os.PathLike[str] = False,
    trainable_only: bool = False,
    progress: bool = True,
    trace: Carrier | None = None,
) -> Run:
    """Train by running ``loop(worker)`` on every worker until the stream's epochs are done.

    Calling it again by the same name resumes from the newest checkpoint; a finished run is
    returned as it is, unless the stream now has more epochs.

    Args:
        loop: a person's torch code; see :class:`lepton.training.Worker`.
        stream: the rows, from ``table.stream(...)`` or :func:`lepton.stream.mix`.
        name: the run's name: letters, digits, ``. _ -``.
        workers: (fewest, most) elastic workers on Ray Train; a number n > 1 is (n, n); 1 runs in
            this process without Ray.
        home: where runs are kept; see :func:`lepton.lake.home_of`.
        checkpoint_every: steps between checkpoints.
        keep: how many of the newest checkpoints stay on disk; default all. The one with the lowest
            loss, and those that registered models were made of, always do.
        keep_best: how many of the best stay beside them: by the figure of ``stop``, or by the loss
            without it.
        checkpoints: a URL such as ``s3://bucket/prefix`` under which checkpoints are kept, each
            run's in a folder of its name (needs ``lepton[s3]``); default the run's folder in the
            home, where the step log stays either way.
        storage_options: credentials and endpoints of that storage, as tables take them; they win
            over the environment, which is all that others who read the checkpoints go by.
        max_failures: how many workers may be lost in a row, that is without ``checkpoint_every``
            steps made in between, before the run gives up.
        hang_timeout_s: silence after which a worker counts as hung and is replaced, seconds. Only
            a process that does not run at all is silent; a slow step is not.
        start_timeout_s: how long to wait for room on the cluster for the first workers, seconds;
            default without end. What is missing is said either way.
        resources: of each worker, such as ``{"CPU": 2, "GPU": 1}``; default one CPU, and one GPU
            if the cluster has any.
        audit: keep every consumed row's identity, for :meth:`Run.consumption`.
        exact: make weights bitwise equal at any number of workers: gradients are summed lane by
            lane, in a fixed order. ``worker.step`` then takes a function of a batch. Slower.
        validate: judge the net on other rows on the way; see :meth:`Run.evaluations`. Checkpoints
            of judged steps carry the figures.
        stop: when to end early, by a figure of ``validate``. The best checkpoint is
            :attr:`Run.best`; training again without ``stop`` goes on to the last step.
        tensorboard: write TensorBoard files, into the run's folder ``tensorboard`` or one of one's
            own: loss, rows/s, world size and the figures of ``validate``.
        trainable_only: keep in each checkpoint only parameters that require a gradient (adapters
            such as LoRA's, a head), buffers and the optimisers' states. What is frozen lies beside
            them once, with its hash, which is checked whenever one is loaded: resuming, registering
            and serving work as ever. A parameter that is unfrozen later is kept from then on.
        progress: show a live line while it runs: on a terminal and in a notebook in place,
            elsewhere a line every ten seconds.
        trace: the span to run under; default a new trace.

    Raises:
        ValueError: workers, checkpoint_every or the name are impossible; the lanes do not fit;
            ``stop`` is about a figure that there is not.
        LakeError: the rows to validate on lack a column, or there are none.
        TrainingError: the loop failed, the name belongs to another run, or the cluster had no room
            within ``start_timeout_s``.
    """
    fewest, most = bounds_of("workers", workers)
    if not callable(loop):
        raise TypeError("loop must be a function of one argument, the worker")
    if not _NAME.fullmatch(name):
        raise ValueError(f"run name {name!r} must be letters, digits, '.', '_' or '-'")
    if min(checkpoint_every, keep_best, 1 if keep is None else keep) < 1 or max_failures < 0:
        raise ValueError(
            "checkpoint_every, keep and keep_best must be at least 1, max_failures at least 0"
        )
    stream = stream.with_lanes(most)
    folder = run_folder(name, home)
    parent = trace or Carrier("", str(folder.parent.parent / "traces"))
    if exact and isinstance(stream, Mixture):
        raise ValueError("exact=True is for a stream of one table, not for a mixture")
    judged = _settled(validate, stop, stream)
    board = folder_of(tensorboard, folder)
    _refuse_other(folder, name, stream)
    kept_in = _kept_in(folder, name, checkpoints)
    if _is_done(folder, stream, stop):
        run = load_run(name, home, storage_options)
        if latest(run.where, storage_options, thorough=False) is not None:
            return run
    attributes = {"lepton.run": name, "lepton.table": str(stream.snapshot)}
    parent = parent.with_baggage(attributes)
    with telemetry.span("lepton.train", parent, attributes=attributes) as span:
        with telemetry.span("lepton.open", span.carrier, attributes=attributes) as opening:
            opening.set(lepton_files=len(stream.snapshot.load().files))
        with telemetry.span("lepton.plan", span.carrier) as planning:
            planning.set(lepton_rows=stream.order(0).rows, lepton_steps=stream.steps)
        plan = _plan(folder, name, stream, span.carrier, checkpoint_every, audit)
        plan = replace(plan, lanes=stream.lane_count, keep=keep, keep_best=keep_best, exact=exact)
        plan = replace(plan, checkpoints=kept_in, options=dict(storage_options or {}))
        plan = replace(plan, steps=stream.steps, validation=judged, stop=stop, tensorboard=board)
        code = getattr(loop, "__module__", None) or "__main__"
        plan = replace(plan, trainable_only=trainable_only, code=code)
        _write_run(folder, name, stream, span.carrier, stop, kept_in)
        stream = stream.read_by(stream.engine, span.carrier)
        if workers == 1:
            with watch(folder, stream.steps, stream.batch_size, show=progress):
                _train_here(loop, stream, plan)
        else:
            from lepton.training.ray_trainer import train_on_ray

            bounds = (fewest, most)
            train_on_ray(
                loop,
                stream,
                plan,
                bounds,
                max_failures,
                resources,
                show=progress,
                hang_s=hang_timeout_s,
                start_timeout_s=start_timeout_s,
            )
        run = load_run(name, home, storage_options)
        span.set(lepton_steps=run.steps, lepton_steps_replayed=run.replayed)
        if parent.directory and (lost := telemetry.lost_spans(parent.directory, span.carrier)):
            span.set(lepton_spans_lost=lost)
    if progress and (outcome := outcome_of(run)) is not None:
        sys.stderr.write(f"run {name} {outcome}\n")
    return run


def _refuse_other(folder: Path, name: str, stream: Stream | Mixture) -> None:
    path = folder / "run.json"
    if not path.is_file():
        return
    before = json.loads(path.read_text())
    if before["order"] != stream.identity:
        raise TrainingError(
            f"run {name!r} was begun on {before['table']} with another row order (version, filter, "
            "seed, batch size or lanes differ): resume it with the same stream, or choose another "
            "name"
        )


def _kept_in(folder: Path, name: str, chosen: str | None) -> str:
    """Where the run's checkpoints go: where those of its former lives are, if it had any."""
    before = folder / "run.json"
    known = json.loads(before.read_text()).get("checkpoints", "") if before.is_file() else None
    if chosen is None:
        return known or ""
    if "://" not in chosen:
        raise ValueError(
            f"checkpoints={chosen!r} must be a URL such as s3://bucket/prefix; on a file system "
            "they are in the run's folder: set home="
        )
    wanted = f"{chosen.rstrip('/')}/{name}"
    if known is not None and known != wanted:
        raise TrainingError(
            f"run {name!r} has its checkpoints in {known or folder / 'checkpoints'}, not in "
            f"{wanted}: leave checkpoints= as it was, or choose another name"
        )
    return wanted


def _settled(
    validate: Validation | None, stop: EarlyStopping | None, stream: Stream | Mixture
) -> Settled | None:
    """Check what a run is judged by before it begins."""
    if validate is None:
        if stop is not None:
            raise ValueError("stop= is about a figure of validate=Validation(...): give that, too")
        return None
    settled = validate.settled(stream)
    settled.check(stop)
    return settled


def _is_done(folder: Path, stream: Stream | Mixture, stop: EarlyStopping | None) -> bool:
    path = folder / "done.json"
    if not path.is_file():
        return False
    done = json.loads(path.read_text())
    begun = json.loads((folder / "run.json").read_text())
    if "stopped" in done:
        return stop is not None
    return done["cursor"]["epoch"] >= stream.epochs or begun["epochs"] >= stream.epochs


def _plan(
    folder: Path, name: str, stream: Stream | Mixture, carrier: Carrier, every: int, audit: bool
) -> Plan:
    from lepton.training.plan import Plan

    to_json = getattr(stream.transform, "to_json", None)
    return Plan(
        folder=str(folder),
        checkpoint_every=every,
        audit=audit,
        lineage={**_lineage(stream), "run": name, "trace_id": carrier.trace_id},
        preparation=to_json() if to_json else None,
        carrier=carrier,
        session=uuid.uuid4().hex[:12],
        seed=stream.seed,
    )


def _lineage(stream: Stream | Mixture) -> dict[str, Any]:
    snapshot = stream.snapshot
    return {
        "table": snapshot.uri,
        "table_version": snapshot.version,
        "tables": _tables(stream),
        "columns": list(snapshot.schema.names),
        "types": _types(snapshot.schema),
        "filter": None if snapshot.predicate is None else str(snapshot.predicate),
        "seed": stream.seed,
        "epochs": stream.epochs,
        "batch_size": stream.batch_size,
        "lanes": stream.lane_count,
        "code": _code_version(),
        "python": sys.version.split()[0],
        "packages": {p: _version(p) for p in _PACKAGES},
    }


def _tables(stream: Stream | Mixture) -> list[str]:
    """``uri@version`` of every table read."""
    streams = stream.streams if isinstance(stream, Mixture) else (stream,)
    return [str(s.snapshot) for s in streams]


def _types(schema: Any) -> dict[str, str]:
    """Arrow type of each column's elements, by name."""
    return {f.name: str(getattr(f.type, "value_type", f.type)) for f in schema}


def _code_version() -> str:
    """The commit of the folder that the run was started in, or an empty string outside git."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],  # noqa: S607 - git from PATH
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _write_run(
    folder: Path,
    name: str,
    stream: Stream | Mixture,
    carrier: Carrier,
    stop: EarlyStopping | None = None,
    kept_in: str = "",
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    body = {
        "v": 1,
        "name": name,
        "table": str(stream.snapshot),
        "tables": _tables(stream),
        "order": stream.identity,
        "epochs": stream.epochs,
        "steps": stream.steps,
        "checkpoints": kept_in,
        "trace_id": carrier.trace_id,
        "traceparent": carrier.traceparent,
        "time": time.time(),
        "stop": stop.to_dict() if stop else None,
    }
    (folder / "done.json").unlink(missing_ok=True)  # there is more to do again
    target = folder / "run.json"
    target.with_suffix(".tmp").write_text(json.dumps(body, indent=1))
    target.with_suffix(".tmp").replace(target)


def _train_here(loop: Loop, stream: Stream | Mixture, plan: Plan) -> None:
    """One worker in this process, no Ray."""
    from lepton.training.worker import Worker

    here = stream.read_by("worker", stream.trace) if stream.engine == "auto" else stream

    def open_shard(rank: int, world_size: int, cursor: Any, _: int) -> Any:
        return here.shard(rank, world_size, cursor)

    worker = Worker(plan, open_shard)
    try:
        loop(worker)
        worker.finish()
    except StreamError as e:
        raise TrainingError(f"the run stopped at step {worker.step_number}: {e}") from e
    finally:
        worker.give_up()
