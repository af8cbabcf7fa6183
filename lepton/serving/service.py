"""How a model's application is run: what is decided when it is started, and not by promotion."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from lepton.serving.access import Grant

POLICY = "lepton.serving.scaling:replicas_for"
REPLICA_CPUS = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """Settings of an application that is started.

    Attributes:
        host: that HTTP is listened to on, on every node that has a replica, where Serve is not
            running yet; None is loopback, ``0.0.0.0`` lets other machines ask, who then need a
            token unless ``access`` says otherwise. On several machines HAProxy needs the latter.
        grpc_port: where it speaks the Open Inference Protocol over gRPC, too: a port, the same on
            every node, or 0 for a free one; None leaves gRPC out.
        grpc_host: that it listens on for that; ``0.0.0.0`` lets other machines ask, who then need
            a token unless ``access`` says otherwise.
        access: who may ask, from :func:`lepton.serving.access.grant`; empty for everybody. None
            takes the tokens of ``LEPTON_SERVE_TOKENS`` (``name=token,name=token``); where that is
            not set, everybody may ask over loopback, and nothing is served to other machines.
        tokens_file: a file of tokens instead, on every node, which may change while replicas run
            (:mod:`lepton.serving.tokens` says how); None takes ``LEPTON_SERVE_TOKENS_FILE``.
        policy: how many replicas: a policy function of Ray Serve, or where it is imported from,
            ``module:function``; the default is :func:`lepton.serving.scaling.replicas_for`.
        ongoing: requests under way that a replica should have.
        grow_after_s, shrink_after_s: seconds that more, or fewer, replicas must be wanted.
        sleep_after_s: seconds without a request after which the last replica goes, where
            ``replicas=(0, most)`` allows that; the next request starts one and waits for it.
        resources: what Ray keeps for each replica: ``CPU`` (a net computes in as many threads as
            that has whole ones), ``GPU`` (may be a fraction, such as 0.25, of the memory too),
            ``memory`` in bytes, or resources of the cluster's own.
        device: where nets compute, as torch names it, such as ``cuda`` or ``cpu``; None takes the
            GPU of a replica that ``resources`` give one, else the CPU. Rows come and answers go by
            the CPU.
        weights_bytes: that the weights of a model's versions may take at most, in each replica;
            None for as much as is free. Where two versions do not fit, a promotion replaces one
            replica after another, while the others answer.
    """

    host: str | None = None
    grpc_port: int | None = None
    grpc_host: str = "127.0.0.1"
    access: tuple[Grant, ...] | None = None
    tokens_file: str | None = None
    policy: str | Callable[..., Any] = POLICY
    ongoing: float = 4.0
    grow_after_s: float = 0.5
    shrink_after_s: float = 30.0
    sleep_after_s: float = 60.0
    resources: Mapping[str, float] = field(default_factory=lambda: {"CPU": REPLICA_CPUS})
    device: str | None = None
    weights_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.grpc_port is not None and not 0 <= self.grpc_port < 2**16:
            raise ValueError(f"grpc_port={self.grpc_port!r} must be a port, 0 or None")
        times = (self.grow_after_s, self.shrink_after_s, self.sleep_after_s)
        if not all(0 <= t < math.inf for t in times) or not 0 < self.ongoing < math.inf:
            raise ValueError(
                f"grow_after_s, shrink_after_s and sleep_after_s must be at least 0 and ongoing "
                f"above 0, not {times} and {self.ongoing!r}"
            )
        _check_policy(self.policy)
        if self.tokens_file is not None and self.access is not None:
            raise ValueError("access= and tokens_file= both say who may ask: give one of them")
        wrong = {n: v for n, v in self.resources.items() if not 0 <= v < math.inf}
        if wrong:
            raise ValueError(f"resources {wrong} must be numbers of at least 0")
        if self.device is not None and self.device.startswith("cuda") and not self.gpus:
            raise ValueError(
                f"device={self.device!r} needs a GPU that Ray keeps for the replica: say so in "
                "resources, such as {'GPU': 0.25}"
            )
        if self.weights_bytes is not None and self.weights_bytes < 1:
            raise ValueError(f"weights_bytes={self.weights_bytes!r} must be at least 1, or None")
        if self.access is not None:
            given = cast("list[Any]", list(self.access))  # of a configuration file: mappings
            grants = tuple(g if isinstance(g, Grant) else Grant(**g) for g in given)
            object.__setattr__(self, "access", grants)

    @property
    def grpc_address(self) -> str:
        """Where a replica listens, host:port; empty where gRPC is left out."""
        return f"{self.grpc_host}:{self.grpc_port}" if self.grpc_port else ""

    @property
    def threads(self) -> int:
        """In how many threads a net computes: as many as it has whole cores, at least one."""
        return max(1, int(self.actor_options["num_cpus"]))

    @property
    def gpus(self) -> float:
        """How many GPUs each replica has; a fraction of one is shared with others."""
        return self.resources.get("GPU", 0.0)

    @property
    def actor_options(self) -> dict[str, Any]:
        """What Ray is told to keep for a replica."""
        named = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
        known = {named[n]: v for n, v in self.resources.items() if n in named}
        own = {n: v for n, v in self.resources.items() if n not in named}
        return {"num_cpus": REPLICA_CPUS, **known, **({"resources": own} if own else {})}


def _check_policy(policy: str | Callable[..., Any]) -> None:
    """Ray Serve finds a policy again by its name."""
    if isinstance(policy, str):
        module, _, name = policy.partition(":")
        found = bool(module and name)
    else:
        home = sys.modules.get(getattr(policy, "__module__", ""))
        found = getattr(home, getattr(policy, "__name__", ""), None) is policy
    if not found:
        raise ValueError(
            f"policy={policy!r} must be a function of a module (no lambda, no inner function), or "
            "'module:function'"
        )


def replicas_of(given: int | tuple[int, int], service: Service | None = None) -> tuple[int, int]:
    """Return (fewest, most) for a number or a pair; the fewest may be 0.

    Raises:
        ValueError: it is neither, or not 0 <= fewest <= most with 1 <= most; or gRPC is spoken,
            which only replicas listen to, so that a call could not start the first one.
    """
    pair: tuple[Any, ...] = (given, given) if isinstance(given, int) else tuple(given)
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in pair)
    if len(pair) != 2 or not whole or not 0 <= pair[0] <= pair[1] or pair[1] < 1:
        raise ValueError(
            f"replicas={given!r} must be a number of at least 1, or (fewest, most) with "
            "0 <= fewest <= most"
        )
    if pair[0] == 0 and service is not None and service.grpc_port is not None:
        raise ValueError(
            "with grpc_port one replica has to stay, as gRPC calls start none: "
            f"say replicas=(1, {pair[1]})"
        )
    return pair[0], pair[1]


def service_of(given: Service | Mapping[str, Any] | None) -> Service:
    """Return settings that came as an object, as a configuration file's mapping, or not at all."""
    return given if isinstance(given, Service) else Service(**(given or {}))
