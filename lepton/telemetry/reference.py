"""Every name of lepton's telemetry on one page, for people: ``docs/telemetry.md``. Pure.

The page is made of the tables themselves, and a test compares the two, so that no name, attribute
or unit changes unseen. After a change that is meant::

    python -m lepton.telemetry.reference > docs/telemetry.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from lepton.telemetry.conventions import ATTRIBUTES, SPANS
from lepton.telemetry.instruments import INSTRUMENTS
from lepton.telemetry.settings import OFFERED

_ABOUT = """\
# Telemetry

Made of the tables in `lepton/telemetry`: change them there, then run
`python -m lepton.telemetry.reference > docs/telemetry.md`. Names of OpenTelemetry's semantic
conventions keep their meaning; all others begin with `lepton.`. Units are UCUM's; what is counted
is in braces. No attribute holds a row or a request's body. What lepton does by itself may have its
exception's message; requests have the kind of their error alone, as a message may quote what was
asked."""

_SPANS = """\
Each may also have `error.type` and, but for requests and batches, `exception.type`,
`exception.message` and `lepton.unfinished`. Times are Unix nanoseconds. A span of a long piece of
work belongs to the process that outlives it, so a killed worker leaves none open. Its file has it
from its beginning: if that process is killed, too, it lasts until the last that is known of what is
below it. A collector gets spans when they have ended."""

_METRICS = """\
Labels never hold the ids of runs, requests or traces. In Prometheus' names dots are underscores,
with `ray_` before them where Ray's endpoint is scraped and the unit behind them where they come by
the collector. Histograms have the trace of a recent value as exemplar by OTLP. They are collected
once an interval, when a process has no more to tell, and at its end. A process that is killed, or
that Ray ends at once because its job is over, takes up to one interval of them with it; how many
values that were is not known, unlike its lost spans, which are counted."""

_SOURCES = """\
Every span, metric and log record names its process: `service.name` (lepton), `service.instance.id`
(host and process id), `process.pid`, `lepton.process` (what it is: a script, a worker, a replica).
A log record has the trace and span it belongs to, and `lepton.run` with `lepton.rank`, or
`lepton.model`. A run's records are those of `lepton`, of the root logger and of the loggers of the
package that its loop is of, at the levels that these have; they hold the errors' stacks. A failed
request's has no message of the error, which may quote a row. Baggage has `lepton.run`,
`lepton.model`, `lepton.version` and `lepton.table`. Spans lie in the home's folder `traces`, two
files of 512 MB for a process at the most; older ones go."""

_VARIABLES: Sequence[tuple[str, str]] = (
    ("OTEL_EXPORTER_OTLP_ENDPOINT", "send traces, metrics and logs there"),
    ("OTEL_EXPORTER_OTLP_<SIGNAL>_ENDPOINT", "send that signal alone, to this very address"),
    ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf, or grpc with `lepton[export]`"),
    ("OTEL_EXPORTER_OTLP_HEADERS, _TIMEOUT, _COMPRESSION, _CERTIFICATE", "as the standard says"),
    *((variable, ", ".join(names)) for variable, names in OFFERED.items()),
    ("OTEL_TRACES_SAMPLER, OTEL_TRACES_SAMPLER_ARG", "which traces; failures are always recorded"),
    ("OTEL_BSP_MAX_QUEUE_SIZE, _MAX_EXPORT_BATCH_SIZE, _SCHEDULE_DELAY", "spans; BLRP for logs"),
    ("OTEL_METRIC_EXPORT_INTERVAL", "milliseconds between two collections, 10000 by default"),
    ("OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES", "what is said of every process"),
    ("OTEL_SDK_DISABLED", "true: no telemetry at all, span files included"),
    (
        "TRACEPARENT, TRACESTATE, BAGGAGE",
        "the trace that what is begun here belongs to, as in a submitted job",
    ),
)


def page() -> str:
    """Return the page as Markdown."""
    spans = [
        (f"`{name}`", span.description, span.owner, _listed(span.attributes))
        for name, span in sorted(SPANS.items())
    ]
    attributes = [
        (f"`{name}`", about.kind, about.unit, about.meaning)
        for name, about in sorted(ATTRIBUTES.items())
    ]
    metrics = [
        (f"`{i.name}`", i.kind, i.unit, i.description, _listed(i.attributes))
        for i in sorted(INSTRUMENTS.values(), key=lambda i: i.name)
    ]
    variables = [(f"`{name}`", what) for name, what in _VARIABLES]
    parts = (
        _ABOUT,
        f"## Spans\n\n{_SPANS}",
        _table(("span", "what", "recorded by", "attributes"), spans),
        "## Attributes of spans",
        _table(("attribute", "type", "unit", "meaning"), attributes),
        f"## Metrics\n\n{_METRICS}",
        _table(("metric", "kind", "unit", "what", "labels"), metrics),
        f"## Processes, logs and baggage\n\n{_SOURCES}",
        "## Environment\n\nNothing leaves a process unless one of these asks for it.",
        _table(("variable", "meaning"), variables),
    )
    return "\n\n".join(parts) + "\n"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.stdout.write(page())
