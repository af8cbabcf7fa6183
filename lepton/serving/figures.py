"""Metrics of requests, made from their spans once a second: a request itself pays nothing."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lepton import telemetry
from lepton.serving.outcome import RPC_CODES
from lepton.telemetry import Common, Several

SHARES_S = 5.0
"""Over so long versions' shares of the requests are taken."""
MOST = 20_000
"""Requests that are gathered; they are measured at once then."""


class Figures:
    """What one replica measures of its requests.

    Args:
        shares_s: seconds over which versions' shares are taken.
    """

    def __init__(self, shares_s: float = SHARES_S) -> None:
        self._shares_s = shares_s
        self._since = time.monotonic()
        self._answered: Counter[tuple[object, object]] = Counter()
        self._gathered: dict[tuple[Common, bool], list[Several]] = {}
        self._count = 0
        self._lock = threading.Lock()
        self._leave = telemetry.gather(self.settle)

    def take(self, some: Several, sampled: bool) -> None:
        """Gather requests that were answered alike; those made for a shadow do not count."""
        if some.common.kind != "server":
            return
        with self._lock:
            self._gathered.setdefault((some.common, sampled), []).append(some)
            self._count += len(some)
            full = self._count >= MOST
        if full:
            self.settle()

    def settle(self) -> None:
        """Measure what was gathered."""
        with self._lock:
            gathered, self._gathered, self._count = self._gathered, {}, 0
            for (common, sampled), parts in gathered.items():
                self._measure(common, parts, sampled)

    def close(self) -> None:
        """Measure what was gathered, for the last time."""
        self._leave()
        self.settle()

    def _measure(self, common: Common, parts: Sequence[Several], sampled: bool) -> None:
        about = common.attributes
        error = common.error or about.get("error.type", "")
        times = np.concatenate([part.times for part in parts], axis=1)
        every = [one for part in parts for one in part.traceparents]
        took: Any = (times[1] - times[0]) / 1e9
        labels = {key: about[key] for key in _LABELS} | _as_http(about)
        labels |= {"error.type": error} if error else {}

        def trace_of(at: int) -> str:
            return f"{every[at][:53]}0{sampled:d}"

        telemetry.measure_all("http.server.request.duration", took, labels, trace_of)
        rows: Any = np.full(len(every), about["lepton.rows"], "f8")
        model = {"lepton.model": about["lepton.model"]}
        telemetry.measure_all("lepton.serving.request.rows", rows, model, trace_of)
        self._answered[about["lepton.version"], about["lepton.variant"]] += len(every)
        self._share(model)

    def _share(self, model: Mapping[str, object]) -> None:
        now = time.monotonic()
        if now - self._since < self._shares_s:
            return
        total = sum(self._answered.values())
        for (version, variant), count in self._answered.items():
            labels = {**model, "lepton.version": version, "lepton.variant": variant}
            telemetry.measure("lepton.serving.share", count / total, labels)
        self._since = now
        self._answered = Counter(dict.fromkeys(self._answered, 0))


def _as_http(about: Mapping[str, object]) -> dict[str, object]:
    """Method and status, of calls by gRPC as they would be over HTTP: one metric has them all."""
    code = about.get("rpc.grpc.status_code")
    status = about["http.response.status_code"] if code is None else _STATUSES[code]
    return {"http.request.method": "POST", "http.response.status_code": status}


_STATUSES: Mapping[object, int] = {code: status for status, code in RPC_CODES.items()}
_LABELS = (
    "lepton.model",
    "lepton.version",
    "lepton.variant",
)
