"""Running the loop on Ray Train: the worker group, who stands in when it breaks, and progress.

Ray Train places the workers and replaces each one that is lost, alone, while the others train on
(its hook for that is a backend with replica groups). Who makes steps with whom is settled at the
run's rendezvous; what a worker restores, and where the stream goes on, by lepton's own checkpoints
and by the survivors. Ray keeps no checkpoint.
"""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2.api.callback import UserCallback  # not re-exported by ray.train
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util import get_node_ip_address as node_address
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lepton import cluster
from lepton.errors import LeptonError, TrainingError
from lepton.stream import Mixture
from lepton.telemetry import name_process
from lepton.training.lookout import ANSWER_S, END_S, Lookout
from lepton.training.meeting import Meeting
from lepton.training.membership import Membership
from lepton.training.places import release_places
from lepton.training.progress import watch
from lepton.training.recovery import fatal_rank
from lepton.training.reserves import Reserves
from lepton.training.run import next_attempt
from lepton.training.waiting import Waiting, room_for

if TYPE_CHECKING:
    from lepton.stream import Stream
    from lepton.training.plan import Plan
    from lepton.training.trainer import Loop

HEALTH_CHECK_S = "0.5"
"""How often Ray Train looks after its workers (its own default is 2 s)."""
POLL_S = 0.25
RETRIES = 100
"""What Ray Train is allowed; the rendezvous knows better how a run gets on (``max_failures``)."""


class _Bare(Backend):
    """Sets nothing up: workers connect at the rendezvous. A worker that fails is replaced alone."""

    has_replica_groups = True


@dataclass
class _BareConfig(BackendConfig):
    @property
    def backend_cls(self) -> type[Backend]:
        return _Bare


class _Controller(TrainController):
    """Ray Train's controller, able to replace several workers that were lost at once."""

    def _replace_bad_workers(self, poll_status: Any) -> None:
        """Replace what can be replaced; what could not be is seen, and tried, by the next poll.

        Ray talks to every other worker while it replaces one, and fails if one of those is lost
        too, so all that are known to be lost are taken down first.
        """
        group = self.get_worker_group()
        replicas = (group.get_replica_groups() if group else None) or []
        for index in poll_status.failing_replica_group_indices:
            replicas[index].shutdown()
        with suppress(ray.exceptions.RayError, WorkerGroupStartupFailedError):
            super()._replace_bad_workers(poll_status)


class _Trainer(DataParallelTrainer):
    """Ray Train's trainer, looked after while it runs, and able to end without its last worker."""

    look_after: Callable[[], bool]
    """Called several times a second; returns whether the run has finished."""

    interrupted: threading.Event
    """Set when the person has interrupted the run."""

    def _create_default_callbacks(self) -> list[Any]:
        """Leave out two actors.

        One gives a killed controller's places back, as :func:`abort` does; it asks the dashboard,
        which a cluster need not have: every run would wait for it at its end. The other has Ray
        Data's datasets, which lepton's streams are not.
        """
        found: list[Any] = super()._create_default_callbacks()
        needless = (PlacementGroupCleanerCallback, DatasetsCallback)
        return [c for c in found if not isinstance(c, needless)]

    def _over(self, running: Any) -> bool:
        if self.interrupted.is_set():
            raise KeyboardInterrupt
        over: list[Any] = ray.wait([running], timeout=POLL_S)[0]
        return bool(over)

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        here = NodeAffinitySchedulingStrategy(
            node_id=ray.get_runtime_context().get_node_id(), soft=False
        )
        actor: Any = ray.remote(_Controller)
        controller = actor.options(num_cpus=0, scheduling_strategy=here).remote(**arguments)
        running = controller.run.remote()
        finished_at: float | None = None
        try:
            while not self._over(running):
                if self.look_after() and finished_at is None:
                    finished_at = time.monotonic()
                if finished_at is not None and time.monotonic() - finished_at > END_S:
                    return abort(controller)
            ray.get(running)
            return ray.get(controller.get_result.remote(), timeout=ANSWER_S)
        except ray.exceptions.GetTimeoutError:
            return abort(controller)  # it has run to its end; what came of it lies in the folder
        except BaseException:
            abort(controller)
            raise


def abort(controller: Any) -> Any:
    """End the controller and its workers; return what stands for a result without an error."""
    aborted = controller.abort.remote()
    ray.wait([aborted], timeout=5)
    ray.kill(controller)
    ray.wait([controller.get_result.remote()], timeout=ANSWER_S)  # it fails when that is done
    release_places(controller)
    return _Ended()


@dataclass(frozen=True)
class _Ended:
    error: None = None


def train_on_ray(
    loop: Loop,
    stream: Stream | Mixture,
    plan: Plan,
    bounds: tuple[int, int],
    max_failures: int,
    resources: Mapping[str, float] | None,
    *,
    show: bool,
    hang_s: float,
    start_timeout_s: float | None = None,
) -> None:
    """Run the loop to its end on a worker group.

    Raises:
        TrainingError: the loop raised, workers were lost more often than allowed, or there was no
            room for them in time.
        KeyboardInterrupt: the person interrupted it; the workers are gone when this is raised.
    """
    cluster.connect()
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", HEALTH_CHECK_S)
    gpu = bool(ray.cluster_resources().get("GPU")) if resources is None else "GPU" in resources
    each = dict(resources) if resources is not None else {"CPU": 1, **({"GPU": 1} if gpu else {})}
    engine = _engine(stream, bounds[1], each)
    stream = stream.read_by(engine, stream.trace)
    reading = engine == "ray_data"
    room = room_for(each, reading=reading)
    core = min(max(bounds[0], room), bounds[1])
    meeting = _meeting(Path(plan.folder), bounds, core, hang_s)
    config: dict[str, Any] = {
        "loop": loop,
        "plan": plan,
        "rows": _hosted(stream, bounds[1]),
        "invitation": meeting.open.remote(),  # it starts beside Ray Train's controller
    }
    told = ray.put(config)  # Ray Train's controller must not unpickle it: that would import torch
    trainer = _Trainer(
        _on_worker,
        train_loop_config={"config": told},
        backend_config=_BareConfig(),
        scaling_config=ScalingConfig(num_workers=core, resources_per_worker=each, use_gpu=gpu),
        run_config=RunConfig(
            name="group",
            storage_path=str(Path(plan.folder) / "ray"),
            failure_config=FailureConfig(max_failures=RETRIES),
            callbacks=[_EndOnOwnErrors()],
        ),
    )
    spares = 1 if room > core else 0
    reserves = Reserves(told, bounds[1] - core + spares, each, max_failures)

    try:
        with watch(Path(plan.folder), stream.steps, stream.batch_size, show=show) as line:
            waiting = Waiting(
                str(plan.lineage["run"]), core, each, start_timeout_s, reading=reading
            )
            trainer.look_after = Lookout(plan, meeting, reserves, line, waiting, max_failures)
            with _interruptions() as trainer.interrupted:
                _fit(trainer, plan)
    finally:
        reserves.end()
        ray.kill(meeting)
    if not (Path(plan.folder) / "done.json").is_file():
        raise TrainingError(
            f"run {plan.lineage['run']!r} ended before its last step: train again by the same name "
            "to go on from its last checkpoint"
        )


@contextmanager
def _interruptions() -> Generator[threading.Event]:
    """Remember an interruption: the exception is lost if it comes inside of a callback of Ray's."""
    seen = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def notice(number: int, frame: Any) -> None:
        seen.set()
        then = before[signal.Signals(number)]
        if callable(then):
            then(number, frame)

    taken = [n for n, then in before.items() if callable(then)]
    for number in taken:
        signal.signal(number, notice)
    try:
        yield seen
    finally:
        for number in taken:
            signal.signal(number, before[number])


def _meeting(folder: Path, bounds: tuple[int, int], core: int, hang_s: float) -> Any:
    membership = Membership(
        fewest=bounds[0], most=bounds[1], expected=core, number=next_attempt(folder)
    )
    here = NodeAffinitySchedulingStrategy(
        node_id=ray.get_runtime_context().get_node_id(), soft=False
    )
    actor: Any = ray.remote(Meeting)
    return actor.options(num_cpus=0, scheduling_strategy=here).remote(
        membership, secrets.token_hex(16), hang_s
    )


def _hosted(stream: Stream | Mixture, most: int) -> Any:
    if isinstance(stream, Mixture):
        return stream.hosted(most)
    from lepton.stream.ray_engine import Hosted

    return Hosted(stream, most)


def _engine(stream: Stream | Mixture, workers: int, each: Mapping[str, float]) -> Any:
    """Choose who reads: Ray Data where CPUs are left beside the trainers."""
    if stream.engine != "auto":
        return stream.engine
    if stream.follow:
        return "worker"
    left = ray.cluster_resources().get("CPU", 0) - workers * each.get("CPU", 0)
    return "ray_data" if left >= 1 else "worker"


def _fit(trainer: _Trainer, plan: Plan) -> None:
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


def _on_worker(given: dict[str, Any]) -> None:
    """The function each Ray Train worker runs."""
    config: Any = ray.get(given["config"])
    run_loop(config, f"train worker {ray.train.get_context().get_world_rank()}")


def run_loop(config: dict[str, Any], title: str, *, stays: bool = True) -> bool:
    """Run the loop as one worker, to the end of the run or of this worker's part in it.

    Args:
        config: what :func:`train_on_ray` put together.
        title: name of the process in the trace.
        stays: whether to wait for the run's end if only the part of this worker is over: Ray Train
            would take a worker that ends for the end of all.

    Returns:
        whether the run goes on without this worker, because its node goes away.
    """
    from lepton.training.rounds import Rounds
    from lepton.training.seat import Leaving, Released, Seat
    from lepton.training.worker import Worker

    name_process(title)
    node = ray.get_runtime_context().get_node_id()
    address: Any = node_address
    invitation: Any = ray.get(config["invitation"])
    seat = Seat(invitation, node=node, host=str(address()))
    rows = config["rows"]

    def open_shard(rank: int, world_size: int, cursor: Any, generation: int) -> Any:
        return rows.shard(rank, world_size, cursor, generation=generation)

    rounds = Rounds(lambda: Worker(config["plan"], open_shard, seat))
    try:
        rounds.run(config["loop"])
    except Leaving:
        if not stays:
            return True
        seat.wait_closed()
    except Released:
        seat.wait_closed()
    except Exception as e:
        if fatal_rank({0: _names(e)}) is not None:
            rank = rounds.worker.rank
            with suppress(AttributeError):  # one with slots
                setattr(e, _RANK, rank)
            seat.leave(f"the training loop raised {type(e).__name__} on rank {rank}: {e}")
        raise
    finally:
        rounds.worker.give_up()
        seat.close()
    return False


_RANK = "_lepton_rank"
"""Attribute of an error: the rank that had it, which need not be that of Ray Train."""


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
        ours = getattr(error, _RANK, rank)
        raise TrainingError(
            f"the training loop raised {type(error).__name__} on rank {ours}: {error}\n"
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
