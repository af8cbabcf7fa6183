"""Metrics of requests, made from their spans in bulk: a request itself pays for none of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import sub

from lepton import telemetry
from lepton.serving.outcome import RPC_CODES
from lepton.telemetry import Common, Left

SHARES_S = 5.0
"""Over so long versions' shares of the requests are taken."""


class Figures:
    """What one replica measures of its requests.

    Args:
        shares_s: seconds over which versions' shares are taken.
    """

    def __init__(self, shares_s: float = SHARES_S) -> None:
        self._shares_s = shares_s
        self._since = time.monotonic()
        self._answered: Counter[tuple[object, object]] = Counter()

    def take(self, common: Common, spans: Sequence[Left], sampled: bool) -> None:
        """Measure requests that were answered alike; those made for a shadow do not count."""
        if common.kind != "server":
            return
        about = common.attributes
        error = common.error or about.get("error.type", "")
        *_, starts, ends = zip(*spans, strict=True)
        took = [ns / 1e9 if ns > 0 else 0.0 for ns in map(sub, ends, starts)]
        labels = {key: about[key] for key in _LABELS} | _as_http(about)
        labels |= {"error.type": error} if error else {}

        def trace_of(at: int) -> str:
            return f"{spans[at][1][:53]}0{sampled:d}"

        telemetry.measure_all("http.server.request.duration", took, labels, trace_of)
        rows = [about["lepton.rows"]] * len(spans)
        model = {"lepton.model": about["lepton.model"]}
        telemetry.measure_all("lepton.serving.request.rows", rows, model, trace_of)
        self._answered[about["lepton.version"], about["lepton.variant"]] += len(spans)
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
