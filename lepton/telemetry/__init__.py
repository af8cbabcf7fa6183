"""Telemetry across processes: one trace, its metrics and its logs; standard OTLP out if asked.

The context travels as a :class:`Carrier` in arguments, configurations and headers, never in
hidden state, with a few words of baggage: the run, the model's version, the table's. Every process
makes its own providers when it first needs them. An ended span is one JSON line in the carrier's
directory at once (a request's within 0.2 s), so a SIGKILL loses little, and how much is counted
(``ledger``, ``losses``); long spans belong to the process that outlives the work, so that a killed
worker leaves no orphan. Steps come a thousand a second: they are gathered by a :class:`Pace` and
told in windows. Requests' spans are encoded many at a time (``spool``, ``wire``).

Nothing leaves the process unless OpenTelemetry's own variables ask for it (``settings``), and
nothing waits for a collector (``delivery``). Names are in ``conventions`` (spans) and
``instruments`` (metrics). This package knows no Ray.
"""

from lepton.telemetry.baggage import entries_of
from lepton.telemetry.bulk import Several
from lepton.telemetry.context import Carrier, carrier_of, name_process, traceparent_in
from lepton.telemetry.delivery import flush
from lepton.telemetry.gpus import watch_gpus
from lepton.telemetry.logs import keep_logs
from lepton.telemetry.losses import Loss, losses_of, lost_spans
from lepton.telemetry.metrics import gather, measure, measure_all, measuring, scrape_by, watch
from lepton.telemetry.pace import Pace, Paced
from lepton.telemetry.sampling import Few
from lepton.telemetry.spans import Span, record, span
from lepton.telemetry.spool import Spool
from lepton.telemetry.store import SpanRecord, spans_of
from lepton.telemetry.wire import Common

__all__ = [
    "Carrier",
    "Common",
    "Few",
    "Loss",
    "Pace",
    "Paced",
    "Several",
    "Span",
    "SpanRecord",
    "Spool",
    "carrier_of",
    "entries_of",
    "flush",
    "gather",
    "keep_logs",
    "losses_of",
    "lost_spans",
    "measure",
    "measure_all",
    "measuring",
    "name_process",
    "record",
    "scrape_by",
    "span",
    "spans_of",
    "traceparent_in",
    "watch",
    "watch_gpus",
]
