"""Checks of Ray: a cluster that can be joined, or a local Ray that could start.

Ray is only ever reached from a process of its own, so that a check leaves no connection behind.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from lepton.doctor.finding import Check, fail, ok, warn
from lepton.doctor.machine import GIB, nearest
from lepton.doctor.network import refused

SOCKET_PATH_LIMIT = 107 if sys.platform.startswith("linux") else 103  # bytes in sockaddr_un

_JOIN = """
import sys, ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
alive = [n for n in ray.nodes() if n["Alive"]]
print(len(alive), "nodes,", ray.cluster_resources().get("CPU", 0), "CPUs")
ray.shutdown()
"""
_START = """
import sys, ray
ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=100 * 2**20,
         _temp_dir=sys.argv[1], logging_level="ERROR", log_to_driver=False)
print("a task answered", ray.get(ray.remote(lambda: 42).remote()))
ray.shutdown()
"""


def cluster(address: str, timeout: float = 30.0) -> Check:
    """Try to reach a Ray cluster, and if something listens there, join it from a subprocess."""
    name = f"ray at {address}"
    advice = (
        "start a cluster there (ray start --head), correct the address or RAY_ADDRESS, or unset "
        "it to use a local Ray"
    )
    if address != "auto":
        error = refused(address)
        if error:
            return fail(name, error, advice)
    if address.startswith("http"):
        return ok(name, "listens (an address for jobs; ray.init takes host:port)")
    joined, said = _run_python(_JOIN, address, timeout)
    if joined:
        return ok(name, said)
    return fail(
        name,
        f"cannot be joined: {said}",
        "check that it is a Ray of the same version with the same Python, and that "
        f"RAY_AUTH_TOKEN fits; else {advice}",
    )


def temp_dir(base: str) -> Check:
    """Check that Ray's session folder is writable, not full, and short enough for its sockets."""
    name, folder = "ray temp folder", str(Path(base).absolute() / "ray")
    advice = "set RAY_TMPDIR to a short path on a disk with room, such as /tmp"
    longest = f"{folder}/session_2026-01-01_00-00-00_000000_{os.getpid():07}/sockets/plasma_store"
    size = len(longest.encode())
    if size > SOCKET_PATH_LIMIT:
        over = f"too long: Ray's socket paths would have {size} bytes, of {SOCKET_PATH_LIMIT}"
        return fail(name, f"{folder} is {over}", advice)
    try:
        with tempfile.TemporaryDirectory(dir=nearest(folder), prefix="lepton-"):
            usage = shutil.disk_usage(nearest(folder))
    except OSError as e:
        return fail(name, f"cannot write {folder}: {e}", advice)
    detail = f"{folder}: writable, {usage.free / GIB:.1f} GiB free"
    if usage.free < 0.05 * usage.total:  # Ray's file system monitor stops creating objects
        detail = f"{detail}, over 95 % full: Ray would refuse to spill or create objects"
        return warn(name, detail, advice)
    return ok(name, detail)


def local_ray(base: str, timeout: float = 120.0) -> Check:
    """Start a local Ray in a subprocess, run one task, stop it."""
    name = "local ray"
    try:
        with tempfile.TemporaryDirectory(
            dir=nearest(base), prefix="lepton-", ignore_cleanup_errors=True
        ) as own:
            started, said = _run_python(_START, own, timeout)
    except OSError as e:
        started, said = False, str(e)
    if started:
        return ok(name, said)
    return fail(
        name,
        f"does not start: {said}",
        "see the other checks for ports, memory and the temp folder; then start one by "
        "hand and read its log: ray start --head --block",
    )


def token(env: Mapping[str, str]) -> Check:
    """Check that Ray's authentication token, if there is one, is for its owner only."""
    name = "ray token"
    path = Path(env.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    required = env.get("RAY_AUTH_MODE") == "token"
    if not path.is_file():
        if required and not env.get("RAY_AUTH_TOKEN"):
            return fail(
                name,
                f"RAY_AUTH_MODE=token, but there is no {path}",
                "make one with: ray get-auth-token --generate",
            )
        return ok(name, "no token file")
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        return warn(
            name,
            f"{path} has mode {mode:04o}: others on this machine can read it",
            f"chmod 600 {path}",
        )
    return ok(name, f"{path}, for its owner only")


def ray_base(env: Mapping[str, str]) -> str:
    """Return the folder above Ray's, as ray._common.utils.get_default_system_temp_dir does."""
    linux = env.get("TMPDIR") if sys.platform.startswith("linux") else None
    return env.get("RAY_TMPDIR") or linux or "/tmp"  # noqa: S108 - Ray's choice, not ours


def _run_python(code: str, argument: str, timeout: float) -> tuple[bool, str]:
    """Run code in a new interpreter; return success and the last line it said."""
    with subprocess.Popen(  # noqa: S603 - our own code, our own interpreter
        [sys.executable, "-c", code, argument],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # Ray shuts down on SIGTERM; its own reaper follows a SIGKILL
            try:
                process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
            return False, f"no answer within {timeout:.0f} s"
    lines = (out if process.returncode == 0 else err or out).strip().splitlines()
    return process.returncode == 0, lines[-1] if lines else f"exit code {process.returncode}"
