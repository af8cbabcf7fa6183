"""GPUs as NVML tells of them: several, slices, figures it does not have, and its errors.

A stand-in has NVML's functions and the names of its errors; most machines have no driver.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from lepton.telemetry import metrics, watch_gpus
from lepton.telemetry.rounds import rounds

SLICE = "MIG-41b35c3b-5e17-5a4c-8f5c-f0c1ab2d3e4f"
UUIDS = ["GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "GPU-8fa11c2b-0000-4106-c12f-20bd9faed9f6"]
UNKNOWN = 2**64 - 1


class NVMLError_NotSupported(Exception):  # noqa: N801, N818 - NVML's name
    """What NVML raises for a figure that a device does not have."""


class Nvml:
    """Two GPUs, and a slice of the first.

    Attributes:
        broken: handles that tell nothing.
        used: bytes in use.
    """

    def __init__(self) -> None:
        self.broken: set[Any] = set()
        self.used = 2**30

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802 - this and the others are NVML's names
        return len(UUIDS)

    def nvmlDeviceGetHandleByIndex(self, number: int) -> Any:  # noqa: N802
        return range(len(UUIDS))[number]

    def nvmlDeviceGetHandleByUUID(self, name: str) -> Any:  # noqa: N802
        return SLICE if name == SLICE else UUIDS.index(name)

    def nvmlDeviceGetUUID(self, handle: Any) -> str:  # noqa: N802
        return UUIDS[handle]

    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any:  # noqa: N802
        if handle == SLICE or handle in self.broken:
            raise NVMLError_NotSupported("Not Supported")
        return SimpleNamespace(gpu=40, memory=3)

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:  # noqa: N802
        if handle in self.broken:
            raise NVMLError_NotSupported("GPU is lost")
        return SimpleNamespace(total=2**37, free=2**36, used=self.used)


class Kept:
    """Keeps what is measured."""

    def __init__(self) -> None:
        self.told: list[tuple[str, float, str]] = []

    def take(self, what: Any, value: float, labels: Any, trace: str) -> None:
        self.told.append((what.name.removeprefix("hw.gpu."), value, labels["hw.id"]))

    def take_all(self, *_: Any) -> None:
        raise AssertionError


@pytest.fixture
def told() -> Iterator[list[tuple[str, float, str]]]:
    found = Kept()
    metrics._state.__init__()
    metrics._state.sinks = [found]
    yield found.told
    metrics._state.__init__()


def _both(*names: str) -> list[tuple[str, float, str]]:
    figures = (("utilization", 0.4), ("memory.usage", 2**30))
    return [(what, value, name) for name in names for what, value in figures]


@pytest.mark.parametrize(
    ("visible", "wanted"),
    [
        (None, _both("0", "1")),
        ("1", _both("1")),
        (" 1 , 0", _both("1", "0")),
        (UUIDS[1], _both(UUIDS[1])),
        ("GPU-8932", _both("GPU-8932")),
        ("GPU-8", []),  # either
        ("0,7,1", _both("0")),
        ("-1", []),
        ("", []),
        (SLICE, [("memory.usage", 2**30, SLICE)]),
    ],
)
def test_a_process_tells_of_its_own_gpus(
    told: list[Any], visible: str | None, wanted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    leave = watch_gpus(Nvml())
    rounds.make()
    leave()
    rounds.make()
    assert told == wanted


def test_what_a_gpu_does_not_tell_is_said_once_and_hides_nothing(
    told: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"{SLICE},1,0")
    nvml = Nvml()
    nvml.broken.add(1)
    leave = watch_gpus(nvml)
    for _ in range(3):
        rounds.make()
    nvml.broken.clear()
    nvml.used = UNKNOWN
    rounds.make()
    leave()

    assert told[:9] == [("memory.usage", 2**30, SLICE), *_both("0")] * 3
    assert told[9:] == [("utilization", 0.4, "1"), ("utilization", 0.4, "0")]
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == len(set(said)) == 5
    assert f"GPU {SLICE} does not tell its hw.gpu.utilization (Not Supported)" in said[0]
    assert "GPU 0 does not tell its hw.gpu.memory.usage (N/A)" in said[-1]


def test_a_library_that_does_not_begin_is_said_unless_there_is_no_driver(
    told: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    absent = type("NVMLError_LibraryNotFound", (Exception,), {})
    other = type("NVMLError_LibRmVersionMismatch", (Exception,), {})
    for error in (absent("no library"), other("a version mismatch")):

        def begin(e: Exception = error) -> None:
            raise e

        library = SimpleNamespace(nvmlInit=begin)
        monkeypatch.setitem(__import__("sys").modules, "pynvml", library)
        watch_gpus()()
    assert told == []
    (said,) = [r.getMessage() for r in caplog.records]
    assert "a version mismatch" in said
