"""Use of this process's GPUs, where the package ``pynvml`` (nvidia-ml-py) is installed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

from lepton.telemetry.metrics import measure, measuring
from lepton.telemetry.rounds import rounds


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

    def tell(_: bool) -> None:
        for number, handle in found:
            labels = {"hw.id": number}
            used = asked.nvmlDeviceGetUtilizationRates(handle).gpu / 100
            measure("hw.gpu.utilization", used, labels)
            measure("hw.gpu.memory.usage", asked.nvmlDeviceGetMemoryInfo(handle).used, labels)

    return rounds.join(tell)


def _library() -> Any:
    with suppress(Exception):  # not installed, or no driver: then there are no GPUs to tell of
        found = import_module("pynvml")
        found.nvmlInit()
        return found
    return None


def _handles(asked: Any) -> Sequence[tuple[str, Any]]:
    """Return the GPUs of ``CUDA_VISIBLE_DEVICES``, all if it is not set: numbers or UUIDs."""
    if asked is None:
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        names = [str(n) for n in range(asked.nvmlDeviceGetCount())]
    else:
        names = [name.strip() for name in named.split(",") if name.strip()]
    found: list[tuple[str, Any]] = []
    by_number, by_id = asked.nvmlDeviceGetHandleByIndex, asked.nvmlDeviceGetHandleByUUID
    for name in names:
        with suppress(Exception):
            found.append((name, by_number(int(name)) if name.isdigit() else by_id(name)))
    return found


def _nothing() -> None:
    """End nothing."""
