"""Metrics of requests, made from their spans in bulk: a request itself pays for none of it."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence

from lepton import telemetry
from lepton.telemetry import Ended

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

    def take(self, spans: Sequence[Ended]) -> None:
        """Measure requests that were answered; those made for a shadow do not count."""
        alike: dict[tuple[object, ...], list[Ended]] = defaultdict(list)
        for span in spans:
            about = span.attributes
            if span.kind == "server":
                version, variant = about["lepton.version"], about["lepton.variant"]
                status = about["http.response.status_code"]
                alike[status, version, variant, span.error].append(span)
        for (_, version, variant, _), several in alike.items():
            _measure(several)
            self._answered[version, variant] += len(several)
        self._share(next(iter(alike.values()), None))

    def _share(self, some: Sequence[Ended] | None) -> None:
        now = time.monotonic()
        total = sum(self._answered.values())
        if some is None or now - self._since < self._shares_s or not total:
            return
        model = some[0].attributes["lepton.model"]
        for (version, variant), count in self._answered.items():
            labels = {"lepton.model": model, "lepton.version": version, "lepton.variant": variant}
            telemetry.measure("lepton.serving.share", count / total, labels)
        self._since = now
        self._answered = Counter(dict.fromkeys(self._answered, 0))


def _measure(spans: Sequence[Ended]) -> None:
    """Measure requests with the same labels."""
    about, error = spans[0].attributes, spans[0].error
    took = [(s.times[1] - s.times[0]) / 1e9 for s in spans]
    traces = [s.traceparent for s in spans]
    labels = {key: about[key] for key in _LABELS} | ({"error.type": error} if error else {})
    telemetry.measure_all("http.server.request.duration", took, labels, traces)
    rows = [s.attributes["lepton.rows"] for s in spans]
    labels = {"lepton.model": about["lepton.model"]}
    telemetry.measure_all("lepton.serving.batch_size", rows, labels, traces)


_LABELS = (
    "http.request.method",
    "http.response.status_code",
    "lepton.model",
    "lepton.version",
    "lepton.variant",
)
