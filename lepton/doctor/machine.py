"""Checks of the machine itself: Python, packages, memory, GPU, and the disk under the home."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from lepton.doctor.finding import Check, fail, ok, warn

GIB = 2**30
PYTHON = (3, 11)
PACKAGES = ("ray", "torch", "pyarrow", "deltalake", "opentelemetry-sdk")


def python() -> Check:
    """Check the interpreter against the package's lower bound."""
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info >= PYTHON:
        return ok("python", found)
    return fail(
        "python",
        f"{found}, lepton needs 3.11 or newer",
        "make a virtual environment with a newer Python, e.g. uv venv --python 3.11",
    )


def packages() -> list[Check]:
    """Check installed versions against the lower bounds in lepton's own metadata, if installed."""
    try:
        requirements = metadata.requires("lepton") or []
    except metadata.PackageNotFoundError:
        requirements = []
    return [package(name, lower_bound(name, requirements)) for name in PACKAGES]


def package(name: str, bound: str | None) -> Check:
    """Check one distribution against a lower bound such as ``2.60``."""
    wanted = f"{name}>={bound}" if bound else name
    advice = f"pip install '{wanted}' into {sys.prefix}"
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return fail(name, "not installed", advice)
    if bound and _numbers(found) < _numbers(bound):
        detail = f"{found}, lepton needs {bound} or newer"
        return fail(name, detail, advice)
    return ok(name, found)


def memory() -> Check:
    """Check processors and the memory that is left."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    left = _memory_left()
    detail = f"{cpus} CPUs, {left / GIB:.1f} GiB of memory free"
    if left >= 2 * GIB:
        return ok("memory", detail)
    return warn(
        "memory",
        detail,
        "Ray kills workers when memory runs out: free some, or use a larger machine",
    )


def shared_memory(path: str = "/dev/shm") -> Check:  # noqa: S108 - the system's name for it
    """Check that Ray's object store (30 % of memory) fits into shared memory."""
    name = "shared memory"
    if not Path(path).is_dir():
        return ok(name, f"no {path} on this system: Ray uses files")
    free, wanted = shutil.disk_usage(path).free, min(int(0.3 * _memory_left()), 200 * 10**9)
    detail = f"{path} has {free / GIB:.1f} GiB free, Ray's object store asks for {wanted / GIB:.1f}"
    if free >= wanted * 0.95:
        return ok(name, detail)
    return warn(
        name,
        f"{detail}: it would fall back to slow files",
        f"give the container --shm-size={wanted // GIB + 1}g, or start Ray with a smaller "
        "object_store_memory",
    )


def gpu() -> Check:
    """Check that torch can use the GPU that the machine has, if it has one."""
    try:
        import torch
    except (ImportError, OSError) as e:
        advice = "install a torch build for this machine: see pytorch.org"
        return fail("gpu", f"torch does not load: {e}", advice)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    driver, build = _driver(), getattr(torch.version, "cuda", None)
    built = f"driver {driver or 'unknown'}, torch {torch.__version__} built for CUDA {build}"
    if available:
        try:
            return ok("gpu", f"{_devices(torch)}; {built}")
        except RuntimeError as e:
            advice = "end the programs that hold the GPU (nvidia-smi lists them)"
            return warn("gpu", f"{built}: {e}", advice)
    if driver:
        reason = f": {caught[0].message}" if caught else ""
        return warn(
            "gpu",
            f"a GPU is here and torch cannot use it ({built}){reason}",
            "install a torch build for this driver (pytorch.org), or a newer driver",
        )
    return ok("gpu", "no GPU: training runs on CPU")


def storage(home: str | None) -> list[Check]:
    """Commit to a real Delta table in a folder that is then removed; see how much room is left."""
    from lepton.errors import LakeError
    from lepton.lake.home import home_of

    advice = "choose a folder on a disk you may write to: --home or LEPTON_HOME"
    try:
        root = home_of(home)
    except LakeError as e:
        return [fail("storage", str(e), advice)]
    try:
        near = nearest(root)
        with tempfile.TemporaryDirectory(dir=near, prefix=".lepton-doctor-") as folder:
            _try_storage(Path(folder))
        free = shutil.disk_usage(near).free
    except Exception as e:  # noqa: BLE001 - whatever a file system throws is the finding
        detail = f"{root} does not work: {type(e).__name__}: {e}"
        return [fail("storage", detail, advice)]
    return [ok("storage", f"{root}: Delta commits and conditional create work"), _room(root, free)]


def _room(root: str, free: int) -> Check:
    detail = f"{free / GIB:.1f} GiB free at {root}"
    if free >= 5 * GIB:
        return ok("disk", detail)
    advice = "checkpoints and tables need room: free some, or move LEPTON_HOME"
    return (warn if free >= GIB else fail)("disk", detail, advice)


def nearest(path: str) -> str:
    """Return the path itself, or the nearest one above it that exists."""
    here = Path(path).absolute()
    return str(next(p for p in (here, *here.parents) if p.exists()))


def lower_bound(name: str, requirements: list[str]) -> str | None:
    """Return the version after ``>=`` in a distribution's unconditional requirement, if any."""
    pattern = re.compile(rf"{re.escape(name)}(\[[^]]*\])?\s*\(?>=\s*([\d.]+)[^;]*$")
    return next((m[2] for r in requirements if (m := pattern.match(r))), None)


def _numbers(version: str) -> tuple[int, ...]:
    parts = re.match(r"[\d.]*", version)
    numbers = [int(n) for n in parts[0].split(".") if n] if parts else []
    return (*numbers, 0, 0, 0)[:3]


def _memory_left() -> int:
    """Bytes, as the smaller of the machine's and the container's (cgroup v2)."""
    try:
        fields = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    left = int(fields[1]) * 1024 if fields else 0
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        return min(left, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return left


def _driver() -> str | None:
    smi = shutil.which("nvidia-smi")
    if not smi:
        return None
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.split("\n", 1)[0].strip() or None


def _devices(torch: Any) -> str:
    parts: list[str] = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        name = torch.cuda.get_device_name(i)
        parts.append(f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free")
    return "; ".join(parts)


def _try_storage(folder: Path) -> None:
    import pyarrow as pa
    from deltalake import DeltaTable, write_deltalake

    table = str(folder / "table")
    for _ in range(2):
        write_deltalake(table, pa.table({"x": [1]}), mode="append")
    if DeltaTable(table).version() != 1:
        raise OSError("a second Delta commit did not become version 1")
    for first in (True, False):
        try:
            with (folder / "once").open("x"):
                created = True
        except FileExistsError:
            created = False
        if created is not first:
            raise OSError("creating a file that exists did not fail: no conditional create here")
