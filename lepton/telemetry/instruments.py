"""Every metric lepton measures: its name, kind, unit, meaning and labels. Pure.

Names with a meaning of their own in OpenTelemetry's semantic conventions keep it
(``http.server.request.duration``); the others begin with ``lepton.``. Labels never hold ids of
runs, requests or traces: the resource says which process it was (``service.instance.id``), or
Ray's own labels do, where Ray's endpoint is scraped. In Prometheus' names dots become underscores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]

SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    120.0,
)
ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 512.0, 2048.0, 8192.0)


@dataclass(frozen=True, slots=True)
class Instrument:
    """One metric.

    Attributes:
        name: as in OpenTelemetry.
        kind: counter (a sum that grows), gauge (the last value) or histogram.
        unit: by UCUM: ``s``, ``By``, ``1``, or what is counted in braces.
        description: what is measured, by whom.
        attributes: the labels it may have.
        bounds: upper bounds of a histogram's buckets, in its unit.
    """

    name: str
    kind: Kind
    unit: str
    description: str
    attributes: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


_MODEL = ("lepton.model",)
_REQUEST = (
    "http.request.method",
    "http.response.status_code",
    "error.type",
    "lepton.model",
    "lepton.version",
    "lepton.variant",
)

INSTRUMENTS: dict[str, Instrument] = {
    i.name: i
    for i in (
        Instrument("lepton.train.rows", "counter", "{row}", "Rows a worker trained on."),
        Instrument(
            "lepton.train.rows_per_second", "gauge", "{row}/s", "Rows a worker trained on lately."
        ),
        Instrument("lepton.train.steps", "counter", "{step}", "Steps made, told by rank 0."),
        Instrument(
            "lepton.train.step.duration",
            "histogram",
            "s",
            "From asking for a batch until its step was made, on one worker.",
            bounds=SECONDS,
        ),
        Instrument(
            "lepton.train.input_wait", "counter", "s", "Time a worker waited for its batches."
        ),
        Instrument(
            "lepton.train.world_size",
            "gauge",
            "{worker}",
            "Workers that train together, by rank 0.",
        ),
        Instrument(
            "lepton.train.steps_replayed",
            "counter",
            "{step}",
            "Lost steps: made again because all workers were lost, told by rank 0.",
        ),
        Instrument(
            "lepton.train.goodput",
            "gauge",
            "1",
            "Share of rank 0's time in which no loss or resize kept it from making steps.",
        ),
        Instrument("lepton.read.rows", "counter", "{row}", "Rows of the table a process read."),
        Instrument(
            "lepton.read.size", "counter", "By", "Bytes of the rows a process read, in memory."
        ),
        Instrument(
            "lepton.train.failures",
            "counter",
            "{failure}",
            "Failures the run went on after, told by rank 0.",
            ("error.type",),
        ),
        Instrument(
            "lepton.train.stragglers",
            "counter",
            "{worker}",
            "Workers named for holding the others up, told by the driver.",
        ),
        Instrument(
            "lepton.train.recovery.duration",
            "histogram",
            "s",
            "From noticing a loss or a resize until the next step was made, told by rank 0.",
            ("lepton.cause",),
            SECONDS,
        ),
        Instrument(
            "lepton.checkpoint.duration",
            "histogram",
            "s",
            "Writing a checkpoint and committing it, beside training.",
            bounds=SECONDS,
        ),
        Instrument("lepton.checkpoint.size", "counter", "By", "Bytes of checkpoints committed."),
        Instrument(
            "lepton.checkpoint.age", "gauge", "s", "Since this worker committed a checkpoint."
        ),
        Instrument(
            "http.server.request.duration",
            "histogram",
            "s",
            "Inference requests, by answer, version and variant.",
            _REQUEST,
            SECONDS,
        ),
        Instrument(
            "lepton.serving.request.rows",
            "histogram",
            "{row}",
            "Rows a request asks about.",
            _MODEL,
            ROWS,
        ),
        Instrument(
            "lepton.serving.batch_size",
            "histogram",
            "{row}",
            "Rows of requests that were run together; one that is answered at once is in no batch.",
            _MODEL,
            ROWS,
        ),
        Instrument(
            "lepton.serving.queue_depth",
            "gauge",
            "{request}",
            "Requests of a replica that wait for the model, or are being run by it.",
            _MODEL,
        ),
        Instrument(
            "lepton.serving.alive",
            "gauge",
            "s",
            "Unix time at which a replica last told of itself; 0 once it was stopped.",
            _MODEL,
        ),
        Instrument(
            "lepton.serving.share",
            "gauge",
            "1",
            "Share of a replica's requests that a version answered, of some seconds.",
            ("lepton.model", "lepton.version", "lepton.variant"),
        ),
        Instrument(
            "lepton.serving.rollbacks",
            "gauge",
            "{rollback}",
            "How often a version of the model was taken back, on trial or as champion.",
            _MODEL,
        ),
        Instrument(
            "lepton.drift",
            "gauge",
            "1",
            "How far the answers of a version on trial are apart from the champion's.",
            ("lepton.model", "lepton.version"),
        ),
        Instrument(
            "lepton.disagreement",
            "gauge",
            "1",
            "Share of rows that a shadow answers otherwise than the champion.",
            ("lepton.model", "lepton.version"),
        ),
        Instrument(
            "hw.gpu.utilization", "gauge", "1", "Use of a GPU, 0 to 1, if pynvml is.", ("hw.id",)
        ),
        Instrument("hw.gpu.memory.usage", "gauge", "By", "Memory of a GPU in use.", ("hw.id",)),
        Instrument(
            "lepton.model.load.duration",
            "histogram",
            "s",
            "Loading and trying out a version in a replica.",
            _MODEL,
            SECONDS,
        ),
        Instrument(
            "lepton.answers.waiting",
            "gauge",
            "{answer}",
            "Answers that wait to be committed to the inference log.",
            _MODEL,
        ),
        Instrument(
            "lepton.answers.dropped",
            "counter",
            "{answer}",
            "Answers left out of the inference log because the lake was behind.",
            _MODEL,
        ),
        Instrument(
            "lepton.telemetry.dropped",
            "counter",
            "{item}",
            "Spans, log records or collections given up: no collector took them, or too many came.",
            ("lepton.signal",),
        ),
    )
}
