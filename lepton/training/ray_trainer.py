"""Running the loop on Ray Train: the worker group, what to do when it breaks, and progress.

Ray Train places the workers and starts them again after a loss, at whatever size between the
bounds the cluster then allows. What a worker restores and where the stream goes on is decided by
lepton's own checkpoints alone; Ray keeps none.
"""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.callback import UserCallback  # not re-exported by ray.train

from lepton import cluster
from lepton.errors import LeptonError, TrainingError
from lepton.telemetry import name_process
from lepton.training.progress import watch
from lepton.training.recovery import fatal_rank

if TYPE_CHECKING:
    from lepton.stream import Mixture, Stream
    from lepton.training.trainer import Loop
    from lepton.training.worker import Plan

HEALTH_CHECK_S = "0.5"
"""How often Ray Train looks after its workers (its own default is 2 s)."""


def train_on_ray(
    loop: Loop,
    stream: Stream | Mixture,
    plan: Plan,
    bounds: tuple[int, int],
    max_failures: int,
    resources: Mapping[str, float] | None,
    *,
    show: bool,
) -> None:
    """Run the loop to its end on a worker group.

    Raises:
        TrainingError: the loop raised, or workers were lost more often than allowed.
        KeyboardInterrupt: the person interrupted it; the workers are gone when this is raised.
    """
    cluster.connect()
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", HEALTH_CHECK_S)
    gpu = bool(ray.cluster_resources().get("GPU")) if resources is None else "GPU" in resources
    each = dict(resources) if resources is not None else {"CPU": 1, **({"GPU": 1} if gpu else {})}
    stream = stream.read_by(_engine(stream, bounds[1], each), stream.trace)
    trainer = TorchTrainer(
        _on_worker,
        train_loop_config={"loop": loop, "plan": plan},
        datasets={"train": stream},
        scaling_config=ScalingConfig(
            num_workers=bounds[0] if bounds[0] == bounds[1] else bounds,
            resources_per_worker=each,
            use_gpu=gpu,
        ),
        run_config=RunConfig(
            name="group",
            storage_path=str(Path(plan.folder) / "ray"),
            failure_config=FailureConfig(max_failures=max_failures),
            callbacks=[_EndOnOwnErrors()],
        ),
    )
    with watch(Path(plan.folder), stream.steps, show=show), _interruptible():
        _fit(trainer, plan)


def _engine(stream: Stream | Mixture, workers: int, each: Mapping[str, float]) -> Any:
    """Choose who reads: Ray Data where CPUs are left beside the trainers."""
    if stream.engine != "auto":
        return stream.engine
    if stream.follow:
        return "worker"
    left = ray.cluster_resources().get("CPU", 0) - workers * each.get("CPU", 0)
    return "ray_data" if left >= 1 else "worker"


def _fit(trainer: TorchTrainer, plan: Plan) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's own deprecations, nothing a person can mend
            trainer.fit()
    except ray.train.ControllerError as e:
        cause = e.controller_failure
        if isinstance(cause, LeptonError):
            raise cause from None
        raise TrainingError(f"Ray Train could not run {plan.lineage['run']!r}: {cause}") from e
    except ray.train.WorkerGroupError as e:
        raise TrainingError(
            f"run {plan.lineage['run']!r} lost workers more often than max_failures allows; train "
            f"again by the same name to go on from its last checkpoint. Last errors: "
            f"{ {rank: _first_line(error) for rank, error in e.worker_failures.items()} }"
        ) from e


def _on_worker(config: dict[str, Any]) -> None:
    """The function each Ray Train worker runs."""
    from lepton.training.worker import Worker

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    name_process(f"train worker {rank}")
    shard: Any = ray.train.get_dataset_shard("train")  # a Shard: see stream/ray_dataset.py
    worker = Worker(config["plan"], shard, rank=rank, world_size=world_size)
    config["loop"](worker)
    worker.finish()


class _EndOnOwnErrors(UserCallback):
    """Ends the run at once when the loop itself is at fault; runs in Ray Train's controller."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise what restarting cannot mend."""
        rank = fatal_rank({r: _names(e) for r, e in worker_exceptions.items()})
        if rank is None:
            return
        error = _own(worker_exceptions[rank])
        if isinstance(error, LeptonError):
            raise error
        raise TrainingError(
            f"the training loop raised {type(error).__name__} on rank {rank}: {error}\n"
            f"{worker_exceptions[rank]}"
        )


def _own(error: BaseException) -> BaseException:
    """The person's exception inside Ray's wrappers."""
    inner = getattr(error, "_base_exc", None) or getattr(error, "cause", None)
    return _own(inner) if isinstance(inner, BaseException) else error


def _names(error: BaseException) -> list[str]:
    found: list[str] = []
    step: BaseException | None = _own(error)
    found += [c.__name__ for c in type(error).__mro__]
    while step is not None:
        found += [c.__name__ for c in type(step).__mro__ if c is not object]
        step = step.__cause__
    return found


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]


@contextmanager
def _interruptible() -> Generator[None]:
    """Turn Ray Train's answer to Ctrl-C (abort, then exit 0) into a KeyboardInterrupt."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if main else None
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if main:
            signal.signal(signal.SIGINT, before)
