"""How a model's application is run: what is decided when it is started, and not by promotion."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """Settings of an application that is started.

    Attributes:
        grpc_port: where it speaks the Open Inference Protocol over gRPC, too: a port, the same on
            every node, or 0 for a free one; None leaves gRPC out.
    """

    grpc_port: int | None = None

    def __post_init__(self) -> None:
        if self.grpc_port is not None and not 0 <= self.grpc_port < 2**16:
            raise ValueError(f"grpc_port={self.grpc_port!r} must be a port, 0 or None")
