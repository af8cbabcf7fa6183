"""How a model's application is run: what is decided when it is started, and not by promotion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from lepton.serving.access import Grant


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """Settings of an application that is started.

    Attributes:
        grpc_port: where it speaks the Open Inference Protocol over gRPC, too: a port, the same on
            every node, or 0 for a free one; None leaves gRPC out.
        access: who may ask, from :func:`lepton.serving.access.grant`; empty for everybody. None
            takes the tokens of ``LEPTON_SERVE_TOKENS`` (``name=token,name=token``); where that is
            not set, everybody may ask over loopback, and nothing is served to other machines.
    """

    grpc_port: int | None = None
    access: tuple[Grant, ...] | None = None

    def __post_init__(self) -> None:
        if self.grpc_port is not None and not 0 <= self.grpc_port < 2**16:
            raise ValueError(f"grpc_port={self.grpc_port!r} must be a port, 0 or None")
        if self.access is not None:
            given = cast("list[Any]", list(self.access))  # of a configuration file: mappings
            grants = tuple(g if isinstance(g, Grant) else Grant(**g) for g in given)
            object.__setattr__(self, "access", grants)


def service_of(given: Service | Mapping[str, Any] | None) -> Service:
    """Return settings that came as an object, as a configuration file's mapping, or not at all."""
    return given if isinstance(given, Service) else Service(**(given or {}))
