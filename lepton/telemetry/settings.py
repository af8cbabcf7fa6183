"""What the environment asks of telemetry: the one place that reads it. OpenTelemetry's own names.

Nothing leaves the process unless a variable asks for it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Literal

Signal = Literal["traces", "metrics", "logs"]

OFFERED: Mapping[str, Sequence[str]] = {
    "OTEL_TRACES_EXPORTER": ("otlp", "none"),
    "OTEL_METRICS_EXPORTER": ("otlp", "prometheus", "none"),
    "OTEL_LOGS_EXPORTER": ("otlp", "none"),
    "OTEL_PROPAGATORS": ("tracecontext", "baggage"),
}
"""What variables may name that list things."""


def otlp(signal: Signal) -> bool:
    """Whether a signal is to be sent by OTLP: an endpoint is named, or ``otlp`` as exporter.

    ``OTEL_<SIGNAL>_EXPORTER=none`` and ``OTEL_SDK_DISABLED=true`` switch it off again.
    """
    if disabled():
        return False
    chosen = _exporters(signal)
    if chosen:
        return "otlp" in chosen
    names = ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT")
    return any(os.environ.get(name) for name in names)


def disabled() -> bool:
    """Whether there is to be no telemetry at all, span files included."""
    return os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"


def not_offered(variable: str) -> list[str]:
    """Return what a variable asks for that lepton does not have, such as console."""
    return sorted(_listed(variable) - {*OFFERED[variable]})


def asked_from() -> tuple[str, str, str]:
    """``TRACEPARENT``, ``BAGGAGE`` and ``TRACESTATE``, as a job gets them: where it comes from."""
    traceparent, baggage, tracestate = (
        os.environ.get(name, "") for name in ("TRACEPARENT", "BAGGAGE", "TRACESTATE")
    )
    return traceparent, baggage, tracestate


def prometheus() -> bool:
    """Whether metrics are to be scraped (``OTEL_METRICS_EXPORTER=prometheus``, or in its list)."""
    return not disabled() and "prometheus" in _exporters("metrics")


def endpoint(signal: Signal) -> str:
    """Where a signal is sent to, as a person would look for it."""
    own = os.environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT")
    grpc = protocol(signal) == "grpc"
    base = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if grpc:
        return own or base or "http://localhost:4317"
    base = base or "http://localhost:4318"
    return own or f"{base.rstrip('/')}/v1/{signal}"


def protocol(signal: Signal) -> str:
    """How a signal is sent: ``http/protobuf`` unless the environment says otherwise."""
    own = os.environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_PROTOCOL", "").strip()
    return own or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "").strip() or "http/protobuf"


def number(name: str, otherwise: float) -> float:
    """A positive number from a variable; ``otherwise`` if it is absent or no such number."""
    try:
        value = float(os.environ.get(name, ""))
    except ValueError:
        return otherwise
    return value if 0 < value < math.inf else otherwise


def _exporters(signal: Signal) -> set[str]:
    return _listed(f"OTEL_{signal.upper()}_EXPORTER")


def _listed(variable: str) -> set[str]:
    return {name.strip().lower() for name in os.environ.get(variable, "").split(",")} - {""}
