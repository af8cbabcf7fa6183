"""A model's application on Ray Serve: started once, told of new versions by the registry alone."""

from __future__ import annotations

import atexit
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig, HTTPOptions
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from lepton import cluster
from lepton.errors import ServingError
from lepton.serving import tables
from lepton.serving.access import VARIABLE, grants_in
from lepton.serving.asking import table_of
from lepton.serving.deployed import DeployedReplica
from lepton.serving.following import FOLLOW_S
from lepton.serving.sequences import LINES
from lepton.serving.service import Service, replicas_of, service_of
from lepton.telemetry import Carrier

PORT = 8000
QUIET = {"log_level": "WARNING", "enable_access_log": False}
MOST_ONGOING = 1000  # of one replica, which itself refuses what it cannot answer soon
WAIT_S = 120.0
SETTLE_S = 2 * FOLLOW_S
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class App:
    """A running application.

    Attributes:
        model: its name.
        url: where it answers, without a trailing slash; the Open Inference Protocol is below it.
        token: sent by :meth:`predict`; default that of ``LEPTON_SERVE_TOKEN``.
    """

    model: str
    url: str
    token: str = field(default="", repr=False)

    @property
    def infer_url(self) -> str:
        """Where inference requests are posted."""
        return f"{self.url}/v2/models/{self.model}/infer"

    @property
    def grpc_address(self) -> str:
        """Where it speaks gRPC, host:port.

        Raises:
            ServingError: it does not, or is not running.
        """
        told = [r["grpc"] for r in self.replicas() if r.get("grpc")]
        if not told:
            raise ServingError(
                f"model {self.model!r} is not served by gRPC: start it with "
                "service=Service(grpc_port=0)"
            )
        return str(told[0])

    def predict(self, rows: Any, *, trace: Carrier | None = None) -> dict[str, Any]:
        """Ask over HTTP and return outputs by name, NumPy arrays of shape (rows, …).

        Args:
            rows: raw rows: an Arrow table, a pandas frame, or a mapping of names to arrays or
                tensors; columns the model does not take are left out.
            trace: the span that asks.

        Raises:
            ServingError: the rows are not what the model takes; or no answer, or an error
                instead of one.
        """
        headers = dict(trace.headers) if trace else {}
        headers |= self._allowed
        headers |= {"content-type": tables.MEDIA_TYPE, "accept": tables.MEDIA_TYPE}
        headers |= {"x-request-id": uuid.uuid4().hex}
        try:
            described = httpx.get(
                f"{self.url}/v2/models/{self.model}", headers=self._allowed, timeout=30
            ).json()
            body = tables.stream_of_rows(table_of(rows, _inputs(described)))
            reply = httpx.post(self.infer_url, content=body, headers=headers, timeout=60)
        except (httpx.HTTPError, ValueError, KeyError) as e:
            raise ServingError(f"{self.url} gives no answer: {e}; is it still running?") from e
        if reply.status_code != 200:
            raise ServingError(f"{self.infer_url} answered {reply.status_code}: {reply.text[:500]}")
        return tables.outputs_of_stream(reply.content)

    def generate(
        self, prompt: Sequence[int], *, trace: Carrier | None = None, **parameters: Any
    ) -> Iterator[int]:
        """Ask a sequence model and yield its tokens as they come; leaving off ends its work.

        Args:
            prompt: the tokens to go on from.
            trace: the span that asks.
            parameters: ``max_tokens``, ``temperature``, ``seed``, ``stop`` and ``timeout`` (µs).

        Raises:
            ServingError: it is no sequence model, or gives no answer.
        """
        url = f"{self.url}/v2/models/{self.model}"
        headers = (dict(trace.headers) if trace else {}) | self._allowed
        try:
            name = _inputs(httpx.get(url, headers=headers, timeout=30).json())[0]["name"]
            asked = {name: [int(t) for t in prompt], "parameters": parameters}
            headers["accept"] = LINES
            stream = httpx.stream(
                "POST", f"{url}/generate_stream", json=asked, headers=headers, timeout=120
            )
            with stream as reply:
                if reply.status_code != 200:
                    text = reply.read().decode()
                    raise ServingError(f"{reply.url} answered {reply.status_code}: {text[:500]}")
                yield from _tokens(reply)
        except (httpx.HTTPError, ValueError, KeyError) as e:
            raise ServingError(f"{self.url} gives no answer: {e}; is it still running?") from e

    @property
    def _allowed(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token}"} if self.token else {}

    def flush(self) -> None:
        """Have every replica commit its inference log and write its spans now.

        Raises:
            ServingError: the application is not running, or the lake did not take the log (the
                replicas keep it and try again).
        """
        if not all(self._broadcast("flush")):
            raise ServingError(
                f"the inference log of {self.model!r} could not be committed; the replicas' log "
                "says why, and they try again"
            )

    def replicas(self) -> list[dict[str, Any]]:
        """Return what each running replica serves, after it looked at the registry.

        Empty where all have gone because nobody asks.

        Raises:
            ServingError: the application is not running.
        """
        return self._broadcast("follow")

    def _broadcast(self, method: str) -> list[Any]:
        """Call a method of every replica."""
        try:
            handle = serve.get_app_handle(_app_name(self.model))
            with ThreadPoolExecutor(1) as thread:  # a notebook's own thread runs an event loop
                asked = thread.submit(lambda: handle.broadcast(method).results(timeout_s=WAIT_S))
                return list(asked.result())
        except DeploymentUnavailableError as e:
            status = serve.status().applications.get(_app_name(self.model))
            if status is not None and status.status in ("DEPLOYING", "RUNNING"):
                return []  # all have gone for want of requests, or none is there yet
            raise ServingError(f"{self.model!r} has no replicas any more: {e}") from e
        except (RayServeException, TimeoutError, RayError) as e:
            raise ServingError(f"the replicas of {self.model!r} cannot be asked: {e}") from e

    def wait_for(self, seq: int, timeout_s: float = WAIT_S) -> None:
        """Wait until every replica serves the pointer of event ``seq`` or a later one.

        Raises:
            ServingError: a replica could not load a version, or time ran out.
        """
        began = time.monotonic()
        end = began + timeout_s
        while True:
            found = self.replicas()
            errors = [r["error"] for r in found if r["error"]]
            if errors:
                raise ServingError(f"a replica of {self.model!r} refused the version: {errors[0]}")
            if found and all(r["seq"] >= seq for r in found):
                left = began + SETTLE_S - time.monotonic()
                if left <= 0:
                    return
                time.sleep(left)  # a replica just starting is not asked yet, but follows by itself
            if not found:
                self._wake()
            if time.monotonic() > end:
                raise ServingError(f"replicas of {self.model!r} are behind event {seq}: {found}")

    def _wake(self) -> None:
        """Have a replica started where all have gone for want of requests."""
        with suppress(httpx.HTTPError):  # it is asked again
            httpx.get(f"{self.url}/v2/health/live", timeout=5)

    def close(self) -> None:
        """Stop the application; what its replicas have logged is committed first."""
        serve.delete(_app_name(self.model))


def _inputs(described: Mapping[str, Any]) -> Any:
    if "inputs" not in described:
        raise ServingError(f"the model's metadata cannot be had: {described.get('detail')}")
    return described["inputs"]


def _tokens(reply: httpx.Response) -> Iterator[int]:
    for line in reply.iter_lines():
        told = json.loads(line)
        if "error" in told:
            raise ServingError(f"{reply.url} ended with status {told['status']}: {told['error']}")
        if "token" in told:
            yield told["token"]


def build(args: Mapping[str, Any]) -> serve.Application:
    """Build the application; also for ``serve run`` and Serve's configuration files.

    Args:
        args: ``model`` and ``home``; ``replicas`` as (fewest, most) or a number; ``service`` as a
            :class:`lepton.serving.service.Service` or its fields.
    """
    service = service_of(args.get("service"))
    if service.access is None:
        service = replace(service, access=grants_in(os.environ))
    if service.grpc_port == 0:
        service = replace(service, grpc_port=cluster.free_ports(1)[0])
    fewest, most = replicas_of(args.get("replicas", 1), service)
    scaling = AutoscalingConfig(
        min_replicas=fewest,
        max_replicas=most,
        initial_replicas=max(1, fewest),  # the first one proves that the champion can be loaded
        target_ongoing_requests=service.ongoing,
        upscale_delay_s=service.grow_after_s,
        downscale_delay_s=service.shrink_after_s,
        downscale_to_zero_delay_s=service.sleep_after_s,
        metrics_interval_s=0.5,
        look_back_period_s=1,
        policy=AutoscalingPolicy(policy_function=service.policy),
    )
    ingress: Any = serve.ingress()(DeployedReplica)
    deployment: Any = serve.deployment(
        ingress,
        name="replica",
        autoscaling_config=scaling,
        max_ongoing_requests=MOST_ONGOING,
        max_queued_requests=MOST_ONGOING,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=1),
        ray_actor_options=service.actor_options,
        graceful_shutdown_timeout_s=10,
        logging_config=QUIET,
    )
    return deployment.bind(args["model"], args["home"], args.get("trace"), service)


def start(
    model: str,
    home: str,
    *,
    replicas: int | tuple[int, int] = 1,
    port: int | None = None,
    service: Service | None = None,
    trace: Carrier | None = None,
) -> App:
    """Start a model's application, or return it where it runs already.

    The registry must have a champion for it. Replicas autoscale between the bounds.

    Args:
        model: the registered name.
        home: where the registry is.
        replicas: (fewest, most), or a number; with 0 the last one goes when nobody asks.
        port: for HTTP, when Serve is not running yet; default 8000, or a free one if it is taken.
        service: more settings of an application that is not running yet.
        trace: the span whose directory keeps the replicas' spans.

    Raises:
        ServingError: it did not come up; the message says why.
    """
    replicas_of(replicas, service)
    cluster.connect()
    _start_serve(port)
    name = _app_name(model)
    running = serve.status().applications.get(name)
    if running is None or running.status != "RUNNING":
        args = {"model": model, "home": home, "replicas": replicas, "trace": trace}
        args |= {"service": service or Service()}
        _refuse_strangers(service or Service(), model)
        try:
            serve.run(build(args), name=name, route_prefix=f"/{model}")
        except RuntimeError as e:
            details = serve.status().applications.get(name)
            why = "; ".join(d.message for d in details.deployments.values()) if details else ""
            serve.delete(name)
            raise ServingError(f"the application of {model!r} did not start: {why or e}") from e
    return App(model, f"{_base_url()}/{model}", _token())


def attach(model: str) -> App:
    """Return the running application of a model on the connected cluster.

    Raises:
        ServingError: it is not running.
    """
    cluster.connect()
    running = serve.status().applications.get(_app_name(model))
    if running is None:
        raise ServingError(f"model {model!r} is not being served here: promote a version first")
    return App(model, f"{_base_url()}/{model}", _token())


def _token() -> str:
    return os.environ.get("LEPTON_SERVE_TOKEN", "")


def _refuse_strangers(service: Service, model: str) -> None:
    """Nothing is served to other machines by mistake."""
    host = _client().http_config.host or "127.0.0.1"
    if service.access is None and VARIABLE not in os.environ and host not in LOOPBACK:
        raise ServingError(
            f"Serve listens on {host}, which other machines can reach, and model {model!r} has no "
            f"tokens: set {VARIABLE}, or say Service(access=()) to let everybody ask"
        )


def leave() -> None:
    """Let go of the running Serve before this process leaves Ray; the applications run on."""
    client = _client() if ray.is_initialized() else None
    if client is not None:
        client.shutdown_cached_handles()


def _app_name(model: str) -> str:
    return f"lepton-{model}"


def _start_serve(port: int | None) -> None:
    atexit.unregister(leave)
    atexit.register(leave)  # Serve's threads would call a Ray that is gone, and so start a new one
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if _client() is not None:
        return
    chosen = port or (PORT if _is_free(PORT) else 0) or cluster.free_ports(1)[0]
    serve.start(
        http_options=HTTPOptions(host="127.0.0.1", port=chosen),
        logging_config=QUIET,
    )


def _client() -> Any:
    """The client of a running Serve, or None. Serve has no public way to ask for its port."""
    from ray.serve import context

    get: Any = context._get_global_client  # pyright: ignore[reportPrivateUsage]
    try:
        return get(raise_if_no_controller_running=False)
    except RayServeException:
        return None


def _base_url() -> str:
    options = _client().http_config
    host = "127.0.0.1" if options.host in (None, "0.0.0.0") else options.host  # noqa: S104
    return f"http://{host}:{options.port}"


def _is_free(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) != 0


__all__ = ["App", "attach", "build", "leave", "start"]
