"""A model's application on Ray Serve: started once, told of new versions by the registry alone."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig, HTTPOptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lepton import cluster, ingress
from lepton.errors import ServingError
from lepton.serving import running
from lepton.serving.access import LOOPBACK, grants_in, refuse_strangers
from lepton.serving.client import WAIT_S, App
from lepton.serving.running import Seen
from lepton.serving.service import POLICY, Service, replicas_of, service_of
from lepton.serving.shared import JOINT, SharedReplica, models_of
from lepton.serving.tokens import VARIABLE as TOKENS_FILE
from lepton.serving.tokens import read_grants
from lepton.telemetry import Carrier

PORT = 8000
PREFIX = "lepton-"
"""Of the names of applications: the rest is the models, joined."""
QUIET = {"log_level": "WARNING", "enable_access_log": False}
SURGE_PERCENT = 25
"""How many replicas more there may be while all are replaced; one at least."""
MOST_ONGOING = 1000  # of one replica, which itself refuses what it cannot answer soon

HEALTHY = "HEALTHY"
"""The status of a proxy in Serve's words."""
UP, DOWN = ("ready", "asleep"), ("closed", "draining")
LOOK_S = 0.25

log = logging.getLogger("lepton")


def build(args: Mapping[str, Any]) -> serve.Application:
    """Build the application; also for ``serve run`` and Serve's configuration files.

    Args:
        args: ``model`` (a name, or several) and ``home``; ``replicas`` as (fewest, most) or a
            number; ``service`` as a :class:`lepton.serving.service.Service` or its fields.
    """
    service = service_of(args.get("service"))
    service = _with_tokens(service, os.environ)
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
    replica: Any = serve.ingress()(SharedReplica)
    deployment: Any = serve.deployment(
        replica,
        name="replica",
        autoscaling_config=scaling,
        max_ongoing_requests=MOST_ONGOING,
        max_queued_requests=MOST_ONGOING,
        max_surge_percent=SURGE_PERCENT,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=1),
        ray_actor_options=service.actor_options,
        graceful_shutdown_timeout_s=10,
        logging_config=QUIET,
    )
    models = models_of(args["model"])
    told = replace(service, policy=POLICY)  # a person's function is the controller's alone
    return deployment.bind(models, args["home"], args.get("trace"), told, most)


def _with_tokens(service: Service, environment: Mapping[str, str]) -> Service:
    """Have the environment say who may ask where the settings do not.

    Raises:
        ValueError: the tokens are wrong, as far as this machine can see.
    """
    if service.access is None and service.tokens_file is None:
        path = environment.get(TOKENS_FILE)
        told = {"tokens_file": path} if path else {"access": grants_in(environment)}
        service = replace(service, **told)
    if service.tokens_file is not None and Path(service.tokens_file).exists():
        read_grants(service.tokens_file)  # a node of its own may have it where this one does not
    return service


def start(
    model: str,
    home: str,
    *,
    replicas: int | tuple[int, int] = 1,
    port: int | None = None,
    service: Service | None = None,
    trace: Carrier | None = None,
    upgrade: bool = False,
) -> App:
    """Start a model's application, or return it where it runs already, as it is.

    The registry must have a champion for it. Replicas autoscale between the bounds.

    Args:
        model: the registered name.
        home: where the registry is.
        replicas: (fewest, most), or a number; with 0 the last one goes when nobody asks.
        port: for HTTP, when Serve is not running yet; default 8000, or a free one if it is taken.
        service: more settings of an application that is not running yet.
        trace: the span whose directory keeps the replicas' spans.
        upgrade: where it runs already, replace its replicas by new ones, with the code of now and
            these settings: each new one answers before an old one goes, and no request fails.
            Weights need none of that; they come by promotion.

    Raises:
        ServingError: it did not come up; the message says why.
    """
    how: dict[str, Any] = {"replicas": replicas, "port": port, "service": service}
    return serve_all([model], home, **how, trace=trace, upgrade=upgrade)[model]


def serve_all(
    models: Sequence[str],
    home: str,
    *,
    replicas: int | tuple[int, int] = 1,
    port: int | None = None,
    service: Service | None = None,
    trace: Carrier | None = None,
    upgrade: bool = False,
) -> dict[str, App]:
    """Start one application for several models, or return it where it runs already.

    Every replica has all of them: for many small models that are seldom asked, as each takes
    memory but no process. They are promoted each by itself, and scale together. Arguments and
    errors as for :func:`start`; each model needs a champion.

    Raises:
        ServingError: one of them is served by another application, too.
    """
    replicas_of(replicas, service)
    together = models_of(models)
    cluster.connect()
    _start_serve(service or Service(), port)
    name = f"{PREFIX}{JOINT.join(together)}"
    known = running.status()
    for model in together:
        other = _application_of(model, known)
        if other is not None and other != name:
            if len(together) == 1 and not upgrade:
                return {model: _until_up(_app(model, other), known)}
            if len(together) == 1:
                sharing = other.removeprefix(PREFIX).split(JOINT)
                raise ServingError(
                    f"model {model!r} shares its replicas, which are upgraded for all models: "
                    f"serve_all({sharing}, home, upgrade=True)"
                )
            raise ServingError(
                f"model {model!r} is served by application {other!r} already: close that one first"
            )
    apps = {model: _app(model, name) for model in together}
    first = apps[together[0]]
    if upgrade or is_down(known.status(name), known.state(name)):
        args = {"model": together, "home": home, "replicas": replicas, "trace": trace}
        args |= {"service": service or Service()}
        _refuse_strangers(service or Service(), running.client().http_config.host)
        _run(first, args)
    else:
        _until_up(first, known)
    return apps


def is_down(application: str, state: str) -> bool:
    """Return whether an application has to be started for anybody to be answered.

    It has not to be where a replica answers, or Ray Serve has one started by itself.

    Args:
        application: its status in Ray Serve, empty where there is none.
        state: as :meth:`App.state` tells it.
    """
    return state in DOWN or (application == "DEPLOY_FAILED" and state == "failed")


def standing(model: str) -> str:
    """Return how the application that has a model is, as :meth:`App.state` tells it."""
    cluster.connect()
    known = running.status()
    name = _application_of(model, known)
    return "closed" if name is None else known.state(name)


def _run(app: App, args: Mapping[str, Any]) -> None:
    """Deploy it; if that fails, delete it if it was not there before."""
    name, before = app.application, app.state()
    try:
        how: Any = {"name": name, "route_prefix": f"/{name.removeprefix(PREFIX)}"}
        running.undisturbed(lambda: cast(Any, serve.run(build(args), **how)))
    except RuntimeError as e:
        why = running.status().why(name) or e
        if before in UP:
            raise ServingError(
                f"application {name!r} was not upgraded, its former replicas serve on: {why}"
            ) from e
        if before in DOWN:
            serve.delete(name)
        raise ServingError(f"application {name!r} did not start: {why}") from e


def _until_up(app: App, known: Seen) -> App:
    """Wait for an application that somebody else has started, or that Ray Serve starts again.

    Args:
        app: which.
        known: what runs, as it was seen just now.

    Raises:
        ServingError: it does not come up.
    """
    end, name = time.monotonic() + WAIT_S, app.application
    while (state := known.state(name)) not in UP:
        if time.monotonic() > end or is_down(known.status(name), state):
            raise ServingError(
                f"application {name!r} does not come up: {known.why(name) or state}; close it and "
                "start it anew, or start it with upgrade=True and its settings"
            )
        time.sleep(LOOK_S)
        known = running.status()
    return app


def attach(model: str) -> App:
    """Return the running application of a model on the connected cluster.

    Raises:
        ServingError: it is not running.
    """
    cluster.connect()
    name = _application_of(model, running.status())
    if name is None:
        raise ServingError(f"model {model!r} is not being served here: promote a version first")
    return _app(model, name)


def _application_of(model: str, known: Seen) -> str | None:
    """The application that has a model, by its name."""
    return next(
        (
            name
            for name in known.applications
            if name.startswith(PREFIX) and model in name.removeprefix(PREFIX).split(JOINT)
        ),
        None,
    )


def _app(model: str, name: str) -> App:
    url = f"{_base_url()}/{name.removeprefix(PREFIX)}"
    return App(model, url, os.environ.get("LEPTON_SERVE_TOKEN", ""), name)


def leave() -> None:
    """Let go of the running Serve before this process leaves Ray; the applications run on."""
    client = running.client() if ray.is_initialized() else None
    if client is not None:
        client.shutdown_cached_handles()


def _refuse_strangers(service: Service, host: str | None) -> None:
    settled = _with_tokens(service, os.environ)
    for listening in (host, service.grpc_host):
        refuse_strangers(listening, settled.tokens_file or settled.access, os.environ)


def _start_serve(service: Service, port: int | None) -> None:
    atexit.unregister(leave)
    atexit.register(leave)  # Serve's threads would call a Ray that is gone, and so start a new one
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    client = running.client()
    if client is not None:
        if service.host not in (None, client.http_config.host):
            raise ServingError(
                f"Serve listens on {client.http_config.host} already, not on {service.host}: it "
                "cannot change while it runs; end it with `serve shutdown` or leave host out"
            )
        return
    _refuse_strangers(service, service.host)
    _tell_what_is_slow(service.host)
    chosen = port or (PORT if _is_free(PORT) else 0) or cluster.free_ports(1)[0]
    try:
        serve.start(
            http_options=HTTPOptions(host=service.host or "127.0.0.1", port=chosen),
            logging_config=QUIET,
        )
    except (RayActorError, TimeoutError) as e:
        _until_let_in(e)


def _until_let_in(why: Exception) -> None:
    """Wait for the proxy that Serve starts in the place of one that did not come up.

    Args:
        why: what became of the first one.

    Raises:
        ServingError: none comes up.
    """
    log.warning(
        "Ray Serve's proxy did not come up (%s); waiting for the next one", type(why).__name__
    )
    end = time.monotonic() + WAIT_S
    while HEALTHY not in running.status().proxies.values():
        if time.monotonic() > end:
            raise ServingError(
                "Ray Serve's proxy does not come up: read its log in the folder logs/serve of "
                "Ray's session (/tmp/ray/session_latest), end Serve with `serve shutdown`, and "
                "start again"
            ) from why
        time.sleep(LOOK_S)


def _tell_what_is_slow(host: str | None) -> None:
    """Warn where requests would not go through HAProxy, straight to any node's replicas."""
    if cluster.is_own() or os.environ.get(ingress.SWITCH) == "0":
        return  # it was settled already
    nodes = _nodes()
    asked = [_switch.options(scheduling_strategy=_on(node)).remote() for node in nodes]
    without = [nodes[i] for i, switch in enumerate(ray.get(asked)) if switch != "1"]
    if without:
        where = ", ".join(sorted({str(node["NodeManagerAddress"]) for node in without}))
        log.warning(
            "requests will go through Ray Serve's own proxy, several times slower than HAProxy, "
            'or miss replicas of %s: before `ray start` there, run `eval "$(lepton ingress)"`',
            where,
        )
    elif len(nodes) > 1 and (host or LOOPBACK[0]) in LOOPBACK:
        log.warning(
            "replicas listen on loopback, so that HAProxy finds only those of its own machine and "
            "leaves the others to Ray Serve's slower proxy: say host='0.0.0.0' and who may ask"
        )


@ray.remote(num_cpus=0)
def _switch() -> str | None:
    """Whether a node was started for HAProxy."""
    return os.environ.get(ingress.SWITCH)


def _on(node: Mapping[str, Any]) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(str(node["NodeID"]), soft=True)


def _nodes() -> list[dict[str, Any]]:
    """The nodes that are alive."""
    every: Any = ray.nodes
    return [node for node in every() if node["Alive"]]


def _base_url() -> str:
    """Where a proxy listens: this machine's, else one of another node."""
    options = running.client().http_config
    host = options.host or "127.0.0.1"
    if host in ("0.0.0.0", "::"):  # noqa: S104 - as asked
        here = ray.get_runtime_context().get_node_id()
        addresses = {str(node["NodeID"]): str(node["NodeManagerAddress"]) for node in _nodes()}
        known = running.status().proxies
        proxies = [n for n, state in known.items() if n in addresses and state == HEALTHY]
        host = "127.0.0.1" if here in proxies or not proxies else addresses[proxies[0]]
    return f"http://[{host}]:{options.port}" if ":" in host else f"http://{host}:{options.port}"


def _is_free(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) != 0


__all__ = ["DOWN", "UP", "App", "attach", "build", "leave", "serve_all", "standing", "start"]
