"""Spans across processes: one trace, carried by hand, kept in files and sent by OTLP.

The context travels as a :class:`Carrier` in arguments, configurations and headers, never in
hidden state. Every process makes its own provider when it first ends a span. An ended span is
one JSON line in the carrier's directory at once, so a SIGKILL loses only unended spans; with
``OTEL_EXPORTER_OTLP_ENDPOINT`` set it is also sent by OTLP over HTTP. Long spans belong to the
process that outlives the work, so that a killed worker leaves no orphan.
"""

from lepton.telemetry.context import Carrier, carrier_of, name_process
from lepton.telemetry.delivery import flush
from lepton.telemetry.logs import keep_logs
from lepton.telemetry.metrics import measure, measuring, scrape_by, watch
from lepton.telemetry.pace import Pace, Paced
from lepton.telemetry.spans import Span, record, span
from lepton.telemetry.spool import Spool
from lepton.telemetry.store import SpanRecord, spans_of

__all__ = [
    "Carrier",
    "Pace",
    "Paced",
    "Span",
    "SpanRecord",
    "Spool",
    "carrier_of",
    "flush",
    "keep_logs",
    "measure",
    "measuring",
    "name_process",
    "record",
    "scrape_by",
    "span",
    "spans_of",
    "watch",
]
