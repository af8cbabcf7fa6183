"""Use of this process's GPUs, where the package ``pynvml`` (nvidia-ml-py) is installed.

What a GPU does not tell (a slice of one has no utilization of its own, one that fell off the bus
tells nothing) is said once and left out, and everything else is told all the same.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

from lepton.telemetry.metrics import measure, measuring
from lepton.telemetry.rounds import rounds

log = logging.getLogger("lepton")

_ABSENT = {"NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded", "ModuleNotFoundError"}
"""There are no GPUs, or nobody wants to hear of them: nothing to say."""
_NOT_AVAILABLE = 2**63
"""NVML has numbers near the largest for what it does not know."""


def watch_gpus(library: Any = None) -> Callable[[], None]:
    """Tell of the GPUs this process may use, once a second; return what ends that.

    Args:
        library: what to ask instead of ``pynvml``, with its functions.
    """
    if not measuring():
        return _nothing
    asked: Any = library if library is not None else _library()
    found = _handles(asked)
    if not found:
        return _nothing
    said: set[tuple[str, str]] = set()

    def tell(_: bool) -> None:
        for name, handle in found:
            for what, read in _READ.items():
                try:
                    value = read(asked, handle)
                except Exception as e:  # noqa: BLE001 - NVML's errors are of many kinds
                    if (name, what) not in said:
                        said.add((name, what))
                        log.warning("telemetry: GPU %s does not tell its %s (%s)", name, what, e)
                    continue
                measure(what, value, {"hw.id": name})

    return rounds.join(tell)


def _utilization(asked: Any, handle: Any) -> float:
    return _known(asked.nvmlDeviceGetUtilizationRates(handle).gpu) / 100


def _memory(asked: Any, handle: Any) -> float:
    return _known(asked.nvmlDeviceGetMemoryInfo(handle).used)


def _known(value: int) -> int:
    if value >= _NOT_AVAILABLE:
        raise ValueError("N/A")
    return value


_READ: Mapping[str, Callable[[Any, Any], float]] = {
    "hw.gpu.utilization": _utilization,
    "hw.gpu.memory.usage": _memory,
}


def _library() -> Any:
    try:
        found = import_module("pynvml")
        found.nvmlInit()
    except Exception as e:  # noqa: BLE001 - NVML's errors are of many kinds
        if type(e).__name__ not in _ABSENT:
            log.warning("telemetry: GPUs are not told of: NVML does not begin (%s)", e)
        return None
    return found


def _handles(asked: Any) -> Sequence[tuple[str, Any]]:
    """Return the GPUs of ``CUDA_VISIBLE_DEVICES``, all if it is not set.

    They are named by number, by UUID (of a slice, too), or by the beginning of one. As CUDA has it,
    one that is not there hides those behind it.
    """
    if asked is None:
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        names = [str(n) for n in range(asked.nvmlDeviceGetCount())]
    else:
        names = [name.strip() for name in named.split(",") if name.strip()]
    found: list[tuple[str, Any]] = []
    for name in names:
        handle = _handle(asked, name)
        if handle is None:
            log.warning("telemetry: there is no GPU %s; it and those behind it are left out", name)
            break
        found.append((name, handle))
    return found


def _handle(asked: Any, name: str) -> Any:
    if name.isdigit():
        with suppress(Exception):
            return asked.nvmlDeviceGetHandleByIndex(int(name))
        return None
    with suppress(Exception):
        return asked.nvmlDeviceGetHandleByUUID(name)
    with suppress(Exception):
        every = map(asked.nvmlDeviceGetHandleByIndex, range(asked.nvmlDeviceGetCount()))
        begun = [handle for handle in every if asked.nvmlDeviceGetUUID(handle).startswith(name)]
        return begun[0] if len(begun) == 1 else None
    return None


def _nothing() -> None:
    """End nothing."""
