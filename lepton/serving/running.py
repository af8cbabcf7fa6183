"""What runs on Ray Serve, in few words.

``serve.status()`` would build Serve's whole schema of what its controller tells, pickled functions
and all, which takes many times as long: a promotion asks while requests are answered beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ray.serve.exceptions import RayServeException

MOST_TRIES = 20
_MARK_GONE = "is not registered for pickle by value"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Application:
    """What Serve knows of an application.

    Attributes:
        status: in Serve's words, such as ``RUNNING``.
        replicas: the states in which it has replicas, such as ``STARTING``.
        why: what Serve says of its deployments, if anything.
    """

    status: str
    replicas: Set[str] = frozenset()
    why: str = ""

    @property
    def state(self) -> str:
        """Its state, as :meth:`lepton.serving.client.App.state` tells it."""
        return state_of(self.status, self.replicas)


@dataclass(frozen=True, slots=True)
class Seen:
    """All applications by their names, and each proxy's status by its node's id."""

    applications: Mapping[str, Application] = field(default_factory=dict[str, Application])
    proxies: Mapping[str, str] = field(default_factory=dict[str, str])

    def state(self, name: str) -> str:
        """Return the state of an application; ``closed`` where there is none."""
        known = self.applications.get(name)
        return known.state if known else "closed"

    def status(self, name: str) -> str:
        """Return an application's status in Serve's words, empty where there is none."""
        known = self.applications.get(name)
        return known.status if known else ""

    def why(self, name: str) -> str:
        """Return what Serve says of an application, empty where there is none."""
        known = self.applications.get(name)
        return known.why if known else ""


def client() -> Any:
    """Return the client of a running Serve, or None. Serve has no public way to ask for it."""
    from ray.serve import context

    get: Any = context._get_global_client  # pyright: ignore[reportPrivateUsage]
    try:
        return get(raise_if_no_controller_running=False)
    except RayServeException:
        return None


def status() -> Seen:
    """Return what runs now."""
    found = client()
    return Seen() if found is None else seen_in(found.get_serve_details())


def seen_in(details: Mapping[str, Any]) -> Seen:
    """Return what there is in the controller's details, of which Serve's REST API shows the same.

    Args:
        details: in the form of Serve's schema ``ServeInstanceDetails``.
    """
    applications = {
        name: _application(told) for name, told in details.get("applications", {}).items()
    }
    proxies = (details.get("proxies") or {}).items()
    return Seen(applications, {node: _word(told["status"]) for node, told in proxies})


def state_of(status: str, replicas: Set[str]) -> str:
    """Return an application's state, from Ray Serve's names of its status and replicas' states."""
    if status == "DELETING":
        return "draining"
    if replicas & {"RUNNING", "PENDING_MIGRATION"}:  # one that is to move still answers
        return "ready"
    if replicas & {"STARTING", "UPDATING", "RECOVERING"}:
        return "starting"
    if status in ("DEPLOY_FAILED", "UNHEALTHY"):
        return "failed"
    return "asleep" if status == "RUNNING" else "starting"


def undisturbed(call: Callable[[], T]) -> T:
    """Return what a call of Serve returns, made again where another thread disturbed it.

    Serve marks a policy's module for cloudpickle while it serializes the policy, and then takes the
    mark away: of two threads the second one finds none to take. Nothing has reached Serve by then.
    """
    for _ in range(MOST_TRIES - 1):
        try:
            return call()
        except ValueError as e:
            if _MARK_GONE not in str(e):
                raise
    return call()


def _application(told: Mapping[str, Any]) -> Application:
    deployments: list[Mapping[str, Any]] = list(told.get("deployments", {}).values())
    replicas = {_word(r["state"]) for d in deployments for r in d.get("replicas", ())}
    why = "; ".join(str(d["message"]) for d in deployments if d.get("message"))
    return Application(_word(told["status"]), replicas, why)


def _word(state: Any) -> str:
    """A state's name, which comes as Serve's own enumeration."""
    return str(getattr(state, "value", state))
