"""Metrics of requests, made from their spans in bulk: a request itself pays for none of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from lepton import telemetry
from lepton.telemetry import Ended


def measured(spans: Sequence[Ended]) -> None:
    """Measure requests that were answered; those made for a shadow do not count."""
    if not telemetry.measuring():
        return
    alike: dict[tuple[object, ...], list[Ended]] = defaultdict(list)
    for span in spans:
        about = span.attributes
        if span.kind == "server":
            answered = about["http.response.status_code"], about["lepton.version"]
            alike[*answered, about["lepton.variant"], span.error].append(span)
    for several in alike.values():
        _measure(several)


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
