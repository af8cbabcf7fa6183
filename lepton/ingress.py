"""What makes Ray Serve quick on a local Ray: HAProxy in front, straight to the replicas. Pure.

Serve reads these settings from the environment in which Ray starts (Ray's
``serve/_private/constants.py``). Its default, a proxy in Python, gives a fraction of the requests
per second. Everything that two Rays on one machine would fight over gets a place of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
PORTS = 4
BUFFER_BYTES = 2**16
MIDDLEWARES = "lepton.serving.shortcut.middlewares"
"""What Serve puts in front of its HTTP servers: the way past its bookkeeping."""

LAUNCHER = """#!{python} -S
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: end with the process that started it
if os.getppid() == 1:
    sys.exit("the process that wanted HAProxy is gone")
words = sys.argv[1:]
if "-f" in words:
    at = words.index("-f") + 1
    before = "    option abortonclose\\n"
    with open(words[at]) as f:
        config = f.read()
    words[at] += ".whole"
    with open(words[at], "w") as f:
        f.write(config.replace(before, before + "    option http-buffer-request\\n", 1))
os.execv({haproxy!r}, [{haproxy!r}, *words])
"""
"""Starts HAProxy as Serve cannot be told to.

It ends with the process that started it, so that none is left over, and keeps its port, when Ray
was killed. It reads a request to its end before it sends it on: otherwise a request that comes in
two pieces, as many clients send it, cannot be sent again when its replica is killed.
"""


def settings_of(folder: str, ports: Sequence[int], threads: int, binary: str) -> dict[str, str]:
    """Return the environment to start Ray in.

    A request whose replica was killed under it is sent to another one, as predictions can be
    repeated; that needs its body to fit into HAProxy's buffer.

    Args:
        folder: for HAProxy's files and sockets; its path is short.
        ports: :data:`PORTS` free ones.
        threads: of HAProxy.
        binary: what starts HAProxy.
    """
    metrics, stats, fallback, fallback_grpc = ports
    haproxy: Mapping[str, object] = {
        "BINARY_PATH": binary,
        "CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "SOCKET_PATH": f"{folder}/admin.sock",
        "SERVER_STATE_BASE": folder,
        "SERVER_STATE_FILE": f"{folder}/server-state",
        "METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "METRICS_PORT": metrics,
        "STATS_PORT": stats,
        "NBTHREAD": threads,
        "TUNE_BUFSIZE": BUFFER_BYTES,
        "RETRY_ON": "conn-failure empty-response junk-response",
        "RETRIES": 3,
    }
    return {
        SWITCH: "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": MIDDLEWARES,
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        **{f"RAY_SERVE_HAPROXY_{name}": str(value) for name, value in haproxy.items()},
    }
