"""What makes Ray Serve quick on a local Ray: HAProxy in front, straight to the replicas. Pure.

Serve reads these settings from the environment in which Ray starts (Ray's
``serve/_private/constants.py``). Its default, a proxy in Python, gives a fraction of the requests
per second. Everything that two Rays on one machine would fight over gets a place of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
RETRY_ON = "RAY_SERVE_HAPROXY_RETRY_ON"
ELSEWHERE = 425
"""The status of a replica that wants another one to be asked; no client ever sees it."""
PORTS = 4
BUFFER_BYTES = 2**16
"""HAProxy copies a whole buffer for every request that it may have to send again, however short:
a larger one costs each of them."""
MIDDLEWARES = "lepton.serving.shortcut.middlewares"
"""What Serve puts in front of its HTTP servers: the way past its bookkeeping."""

LAUNCHER = """#!{python} -S
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: end with the process that started it
if os.getppid() == 1:
    sys.exit("the process that wanted HAProxy is gone")
after = {{"option abortonclose": "option http-buffer-request"}}
instead = {{}}
for name in ("METRICS", "STATS"):
    port = os.environ.get(f"RAY_SERVE_HAPROXY_{{name}}_PORT")
    instead[f"bind :{{port}}"] = instead[f"bind *:{{port}}"] = f"bind 127.0.0.1:{{port}}"
without = ("log 127.0.0.1:514 ", "option splice-")
words = sys.argv[1:]
if "-f" in words:
    at = words.index("-f") + 1
    lines = []
    with open(words[at]) as f:
        for line in f:
            told = line.strip()
            line = line.replace(told, instead.get(told, told))
            if not told.startswith(without):
                lines.append(line)
            if told in after:
                lines.append(line.replace(told, after[told]))
    words[at] += ".mended"
    with open(words[at], "w") as f:
        f.writelines(lines)
os.execv({haproxy!r}, [{haproxy!r}, *words])
"""
"""Starts HAProxy as Serve cannot be told to.

It ends with the process that started it, so that none is left over, and keeps its port, when Ray
was killed. In its configuration:

- A request is read to its end before it is sent on: otherwise one that comes in two pieces, as many
  clients send it, cannot be sent again when its replica is killed.
- Its own pages of statistics are for this machine alone.
- No line of a log is made of each request for a syslog that nobody runs, and small messages are
  not spliced, which takes more system calls than to copy them.
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
        "METRICS_ENABLED": 0,  # Serve would parse a line of each request's, in Python
        "METRICS_PORT": metrics,
        "STATS_PORT": stats,
        "NBTHREAD": threads,
        "TUNE_BUFSIZE": BUFFER_BYTES,
        "RETRIES": 3,
    }
    return {
        SWITCH: "1",
        RETRY_ON: f"conn-failure empty-response junk-response {ELSEWHERE}",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": MIDDLEWARES,
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        **{f"RAY_SERVE_HAPROXY_{name}": str(value) for name, value in haproxy.items()},
    }
