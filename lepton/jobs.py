"""Submit a script to a Ray cluster and follow it.

A thin layer over Ray's job API: whatever Ray says about a job is passed on, and what a person
must do about an unreachable cluster or a refused token is said in a :class:`LeptonError`.
Importing this module does not import ray.

    job = lepton.jobs.submit(Path("notebooks/quickstart.py"), working_dir=".")
    for line in job.logs():
        print(line)
    job.wait()
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import socket
import threading
import time
import warnings
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lepton.errors import LeptonError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from lepton.telemetry import Carrier

_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # in Ray's order of precedence
_TRACE_VARIABLES = ("TRACEPARENT", "TRACESTATE", "BAGGAGE")
_DONE = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
_LAST_LINES = 20
_POLL_SECONDS = 0.5
_environment_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Job:
    """A job on a Ray cluster.

    Attributes:
        id: the submission id, as ``ray job status`` takes it.
        address: the HTTP address of the cluster that runs it.
    """

    id: str
    address: str
    _client: JobSubmissionClient = field(repr=False, compare=False)

    def status(self) -> str:
        """Return PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.

        Raises:
            LeptonError: the cluster cannot be asked, or does not know the job.
        """
        with _advice(self.address):
            return str(self._client.get_job_status(self.id).value)

    def logs(self) -> Iterator[str]:
        """Yield the lines of the job's output from its first one, until the job has ended.

        Raises:
            LeptonError: the connection broke before the job ended.
        """
        # Ray's client reports every end of a stream, and asks aiohttp for the default TLS check in
        # a way that aiohttp deprecates.
        logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", "ssl=None is deprecated", DeprecationWarning)
        rest = ""
        with _advice(self.address):
            stream = cast("AsyncGenerator[str, None]", self._client.tail_job_logs(self.id))
            for chunk in _pull(stream):
                *lines, rest = (rest + chunk).split("\n")
                yield from lines
        if rest:
            yield rest

    def wait(self, timeout: float | None = None) -> None:
        """Return once the job has succeeded.

        Args:
            timeout: seconds after which to give up waiting; the job itself goes on.

        Raises:
            LeptonError: the job failed or was stopped (with the last lines of its output), or
                still runs after ``timeout``.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.status()) not in _DONE:
            if deadline is not None and time.monotonic() >= deadline:
                msg = (
                    f"job {self.id} is still {status} after {timeout} s of waiting: "
                    "wait() again, follow logs(), or end it by stop()"
                )
                raise LeptonError(msg)
            time.sleep(_POLL_SECONDS)
        if status != "SUCCEEDED":
            raise LeptonError(f"job {self.id} ended as {status}: {self._last_words()}")

    def stop(self) -> bool:
        """Ask the job to end; ``wait`` or ``status`` tells when it has.

        Returns:
            Whether it was still running.

        Raises:
            LeptonError: the cluster cannot be asked, or does not know the job.
        """
        with _advice(self.address):
            return self._client.stop_job(self.id)

    def _last_words(self) -> str:
        with _advice(self.address):
            message = self._client.get_job_info(self.id).message or "no reason given"
            lines = self._client.get_job_logs(self.id).splitlines()[-_LAST_LINES:]
        # Ray's message for a failed driver repeats the log; its beginning says what happened.
        reason = message.partition(", last available logs")[0].splitlines()[0]
        return "\n".join([reason, "last lines of its output:", *lines])


def submit(
    entrypoint_or_script: str | Path,
    *,
    address: str | None = None,
    working_dir: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    trace: Carrier | None = None,
) -> Job:
    """Submit a job to a running Ray cluster and return at once.

    Args:
        entrypoint_or_script: a shell command (``str``), or the ``Path`` of a Python script.
        address: ``http://host:8265`` of the cluster's dashboard, or ``host:port`` of its GCS.
            Without it RAY_API_SERVER_ADDRESS, then RAY_ADDRESS. An address given here wins over
            both (in Ray's own client the variables win).
        working_dir: a folder to send along (what .gitignore names stays behind), or a URI that
            Ray can fetch. The job runs in it. Without it nothing is sent.
        env: environment variables for the job and its workers. TRACEPARENT, TRACESTATE and
            BAGGAGE of the calling process go along, so that the job continues its trace.
        metadata: kept with the job, for people.
        trace: the span that the job continues instead.

    Raises:
        ValueError: the script is not there, or not inside ``working_dir``.
        LeptonError: the cluster cannot be reached, or refuses the token or the job.
    """
    entrypoint = _command(entrypoint_or_script, working_dir)
    runtime_env: dict[str, Any] = {}
    asked = {name.upper(): value for name, value in trace.headers.items()} if trace else {}
    if variables := _variables({**asked, **(env or {})}, os.environ):
        runtime_env["env_vars"] = variables
    if working_dir is not None:
        runtime_env["working_dir"] = str(working_dir)
    client = _connect(address)
    with _advice(client.get_address()):
        job_id = client.submit_job(
            entrypoint=entrypoint, runtime_env=runtime_env, metadata=dict(metadata or {})
        )
    return Job(job_id, client.get_address(), client)


def _command(entrypoint_or_script: str | Path, working_dir: str | Path | None) -> str:
    """Return the shell command; a script's path is seen from the working directory."""
    if isinstance(entrypoint_or_script, str):
        return entrypoint_or_script
    script = entrypoint_or_script
    if working_dir is None:
        return shlex.join(["python", str(script)])
    if "://" in str(working_dir):
        return shlex.join(["python", script.as_posix()])
    folder = Path(working_dir).resolve()
    inside = script.resolve() if script.exists() else (folder / script).resolve()
    if not inside.is_file() or not inside.is_relative_to(folder):
        raise ValueError(f"no script {script} inside working_dir {folder}")
    return shlex.join(["python", inside.relative_to(folder).as_posix()])


def _variables(env: Mapping[str, str] | None, caller: Mapping[str, str]) -> dict[str, str]:
    """Return the job's variables: the caller's trace context, then what was asked for."""
    trace = {name: caller[name] for name in _TRACE_VARIABLES if name in caller}
    # A tracestate and baggage belong to their traceparent.
    return ({} if env and "TRACEPARENT" in env else trace) | dict(env or {})


def _connect(address: str | None) -> JobSubmissionClient:
    """Return a client of the cluster whose version check has passed."""
    from ray.job_submission import JobSubmissionClient

    known = [os.environ[name] for name in _ADDRESS_VARIABLES if os.environ.get(name)]
    meant = address or next(iter(known), "auto")
    with _advice(meant):
        _knock(meant)
        if address is None:
            return JobSubmissionClient()
        with _without_address_variables():
            return JobSubmissionClient(address)


def _knock(address: str) -> None:
    """Fail at once where nothing listens: Ray tries a GCS address for 40 s."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()


@contextlib.contextmanager
def _without_address_variables() -> Generator[None]:
    """Hide the address variables: Ray's client lets them overrule its own argument."""
    with _environment_lock:
        hidden = {name: os.environ.pop(name, None) for name in _ADDRESS_VARIABLES}
        try:
            yield
        finally:
            os.environ.update({name: value for name, value in hidden.items() if value is not None})


@contextlib.contextmanager
def _advice(address: str) -> Generator[None]:
    """Turn what Ray's client raises into a LeptonError that says what to do."""
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError, RayError

    try:
        yield
    except LeptonError:
        raise
    except AuthenticationError as error:
        msg = (
            f"the Ray cluster at {address} refused the token: set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN) to the cluster's own before Python starts, "
            f"as Ray reads them once. {str(error).splitlines()[0].partition('. Ensure')[0]}"
        )
        raise LeptonError(msg) from error
    except (OSError, aiohttp.ClientError, requests.RequestException, RayError) as error:
        msg = (
            f"no Ray cluster answers at {address}: start one (python clusters/local.py start), "
            "or give address= or RAY_API_SERVER_ADDRESS the http:// address of its dashboard, "
            f"8265 by default. {type(error).__name__}: {error}"
        )
        raise LeptonError(msg) from error
    except RuntimeError as error:
        raise LeptonError(f"the Ray cluster at {address} refused: {error}") from error


def _pull(stream: AsyncGenerator[str, None]) -> Iterator[str]:
    """Iterate an asynchronous generator from anywhere, a notebook's running loop included."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="lepton-job-logs", daemon=True)
    thread.start()

    async def following() -> str | None:
        return await anext(stream, None)

    try:
        while (chunk := asyncio.run_coroutine_threadsafe(following(), loop).result()) is not None:
            yield chunk
    finally:
        asyncio.run_coroutine_threadsafe(stream.aclose(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
