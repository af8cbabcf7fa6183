"""Every span lepton records and every attribute it may have, with units. Pure.

Names of OpenTelemetry's semantic conventions keep their meaning (``http.*``, ``error.type``); all
others begin with ``lepton.``. No attribute holds a row or a request's body. What lepton does by
itself may have its exception's message; requests have only the kind of their error, as a message
may quote what was asked. A span of a long piece of work belongs to the process that outlives it: a
killed worker has none open.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Convention:
    """One span.

    Attributes:
        owner: the process that records it.
        description: from when until when.
        attributes: it may have, beside those of :data:`ON_ALL`.
    """

    owner: str
    description: str
    attributes: tuple[str, ...] = ()


class Attribute(NamedTuple):
    """What an attribute holds.

    Attributes:
        kind: str, int, float, bool, or str[] for several.
        unit: by UCUM, or what is counted in braces; empty where there is none.
        meaning: in words.
    """

    kind: str
    unit: str
    meaning: str


ATTRIBUTES: Mapping[str, Attribute] = {
    "error.type": Attribute(
        "str", "", "what it ended with: an exception's class, WorkerLost or BadRequest"
    ),
    "exception.message": Attribute(
        "str", "", "first line of the exception's message, 500 characters at the most"
    ),
    "exception.type": Attribute("str", "", "the exception's class with its module"),
    "http.request.method": Attribute("str", "", "the request's method"),
    "http.response.status_code": Attribute("int", "", "the answer's status"),
    "http.route": Attribute("str", "", "the request's path, without the version that is named"),
    "lepton.accuracy": Attribute("float", "1", "share of rows answered rightly, 0 to 1"),
    "lepton.bytes": Attribute("int", "By", "size"),
    "lepton.bytes_added": Attribute("int", "By", "size of files added"),
    "lepton.bytes_removed": Attribute("int", "By", "size of files removed"),
    "lepton.checkpoint": Attribute("str", "", "URI of a checkpoint's manifest"),
    "lepton.checkpoint.trace": Attribute(
        "str", "", "traceparent of the checkpoint that answers (also a link)"
    ),
    "lepton.deployment.trace": Attribute(
        "str", "", "traceparent of what brought the version to the replica (also a link)"
    ),
    "lepton.dry_run": Attribute("bool", "", "whether nothing was changed"),
    "lepton.epoch": Attribute("int", "", "epoch, from 0"),
    "lepton.f1": Attribute("float", "1", "macro average, 0 to 1"),
    "lepton.files": Attribute("int", "{file}", "data files of the table's version"),
    "lepton.files_added": Attribute("int", "{file}", "number of files"),
    "lepton.files_removed": Attribute("int", "{file}", "number of files"),
    "lepton.gate": Attribute("str[]", "", "the conditions that held"),
    "lepton.input_wait_s": Attribute("float", "s", "time waited for batches"),
    "lepton.lane": Attribute("int", "", "lane of the stream, from 0"),
    "lepton.mae": Attribute("float", "", "mean absolute error, in the label's unit"),
    "lepton.model": Attribute("str", "", "a model's name"),
    "lepton.mse": Attribute("float", "", "mean squared error, in the label's unit squared"),
    "lepton.precision": Attribute("float", "1", "macro average, 0 to 1"),
    "lepton.r2": Attribute("float", "1", "coefficient of determination, at most 1"),
    "lepton.rank": Attribute("int", "", "rank of the worker, from 0"),
    "lepton.reads": Attribute(
        "int", "{read}", "reads that the span stands for: its own, and those left out before it"
    ),
    "lepton.recall": Attribute("float", "1", "macro average, 0 to 1"),
    "lepton.requests": Attribute("int", "{request}", "number of requests"),
    "lepton.rows": Attribute("int", "{row}", "number of rows"),
    "lepton.run": Attribute("str", "", "a run's name"),
    "lepton.share": Attribute("float", "1", "a canary's share of requests, 0 to 1"),
    "lepton.spans_lost": Attribute(
        "int", "{span}", "spans that killed processes of the run took with them"
    ),
    "lepton.step": Attribute("int", "{step}", "optimiser steps made, at the end of the span"),
    "lepton.step_s.max": Attribute("float", "s", "the slowest step"),
    "lepton.step_s.p50": Attribute("float", "s", "median step"),
    "lepton.step_s.p99": Attribute("float", "s", "99th percentile of steps"),
    "lepton.steps": Attribute("int", "{step}", "number of steps"),
    "lepton.steps_replayed": Attribute("int", "{step}", "steps made again"),
    "lepton.study": Attribute("str", "", "name of several runs that belong together"),
    "lepton.table": Attribute("str", "", "URI and version of a table, uri@version"),
    "lepton.table_version": Attribute("int", "", "version of a table"),
    "lepton.unfinished": Attribute(
        "bool", "", "it is under way, or its process was killed before it ended"
    ),
    "lepton.variant": Attribute("str", "", "champion, canary or pinned"),
    "lepton.version": Attribute("int", "", "version of a model, from 1"),
    "lepton.worker": Attribute("str", "", "a worker's name: node, process, and some letters"),
    "lepton.world_size": Attribute("int", "{worker}", "number of workers"),
    "rpc.grpc.status_code": Attribute("int", "", "gRPC's number of the answer's status"),
    "rpc.method": Attribute("str", "", "the method that was called"),
    "rpc.service": Attribute("str", "", "the service, inference.GRPCInferenceService"),
    "rpc.system": Attribute("str", "", "grpc"),
    "url.path": Attribute("str", "", "the request's path"),
    "url.scheme": Attribute("str", "", "how the replica was asked, http"),
}

ON_ALL = ("error.type", "exception.message", "exception.type", "lepton.unfinished")
"""Attributes that any span may have; those of requests have only the first."""
OF_REQUESTS = ("lepton.request", "lepton.batch", "lepton.model.run")

_UPKEEP = (
    "lepton.dry_run",
    "lepton.table",
    "lepton.table_version",
    "lepton.files_added",
    "lepton.files_removed",
    "lepton.bytes_added",
    "lepton.bytes_removed",
)
_RESIZE = ("lepton.step", "lepton.steps_replayed", "lepton.world_size")
_VERSION = ("lepton.model", "lepton.version")

SPANS: Mapping[str, Convention] = {
    "lepton.demo": Convention("driver", "The whole demo."),
    "lepton.table": Convention(
        "driver", "Writing the demo's table.", ("lepton.table", "lepton.rows")
    ),
    "lepton.use": Convention("driver", "The demo's requests."),
    "lepton.optimize": Convention("driver", "Rewriting a table's small files.", _UPKEEP),
    "lepton.vacuum": Convention("driver", "Deleting files nobody needs.", _UPKEEP),
    "lepton.checkpoint_table": Convention("driver", "Writing a log checkpoint.", _UPKEEP),
    "lepton.restore": Convention("driver", "Going back to an older version.", _UPKEEP),
    "lepton.train": Convention(
        "driver",
        "A call of train().",
        (
            "lepton.run",
            "lepton.table",
            "lepton.steps",
            "lepton.steps_replayed",
            "lepton.spans_lost",
        ),
    ),
    "lepton.cross_validate": Convention(
        "driver", "A call of cross_validate().", ("lepton.study", "lepton.table")
    ),
    "lepton.tune": Convention("driver", "A call of tune().", ("lepton.study", "lepton.table")),
    "lepton.open": Convention(
        "driver",
        "Having the table's log at hand: replayed, unless this process has it already.",
        ("lepton.run", "lepton.table", "lepton.files"),
    ),
    "lepton.plan": Convention(
        "driver", "Working out the order of rows.", ("lepton.rows", "lepton.steps")
    ),
    "lepton.read": Convention(
        "worker or Ray Data task",
        "Reading one unit of rows: of those beyond a few hundred, some in a second.",
        ("lepton.epoch", "lepton.lane", "lepton.rows", "lepton.reads"),
    ),
    "lepton.train.epoch": Convention(
        "worker of rank 0",
        "An epoch, from its first batch or from when the run resumed in it.",
        ("lepton.epoch", "lepton.step", "lepton.world_size"),
    ),
    "lepton.steps": Convention(
        "worker",
        "A few seconds of steps: from asking for the first one's batch until the last was made.",
        (
            "lepton.rank",
            "lepton.world_size",
            "lepton.step",
            "lepton.steps",
            "lepton.rows",
            "lepton.input_wait_s",
            "lepton.step_s.p50",
            "lepton.step_s.p99",
            "lepton.step_s.max",
        ),
    ),
    "lepton.slow_step": Convention(
        "worker",
        "A single step that took many times as long as the usual one: one a second at the most.",
        ("lepton.rank", "lepton.world_size", "lepton.step", "lepton.rows", "lepton.input_wait_s"),
    ),
    "lepton.train.failure": Convention(
        "worker of rank 0",
        "From when the others were waited for in vain until the next step was made.",
        _RESIZE,
    ),
    "lepton.train.resize": Convention(
        "worker of rank 0", "From coming together anew until the next step was made.", _RESIZE
    ),
    "lepton.train.straggler": Convention(
        "driver",
        "From when a worker was found to hold the others up until that was told.",
        ("lepton.worker", "lepton.step", "lepton.world_size"),
    ),
    "lepton.checkpoint": Convention(
        "worker of rank 0", "Writing and committing a checkpoint.", ("lepton.step", "lepton.bytes")
    ),
    "lepton.checkpoint.snapshot": Convention(
        "worker of rank 0", "Copying the state; the step waits for that alone."
    ),
    "lepton.checkpoint.write": Convention("worker of rank 0", "Writing the data files."),
    "lepton.checkpoint.commit": Convention("worker of rank 0", "Putting the manifest in place."),
    "lepton.recovery.detect": Convention(
        "worker of rank 0", "From when its part of a step was given until the loss was noticed."
    ),
    "lepton.recovery.meet": Convention(
        "worker of rank 0", "From noticing a loss or a change until the workers had met anew."
    ),
    "lepton.recovery.state": Convention("worker of rank 0", "Until all had the state of one step."),
    "lepton.recovery.step": Convention("worker of rank 0", "Until the next step was made."),
    "lepton.evaluate": Convention(
        "driver, or worker of rank 0",
        "An evaluation: of a checkpoint, or of the net between two steps.",
        (
            "lepton.table",
            "lepton.checkpoint",
            "lepton.step",
            "lepton.world_size",
            "lepton.rows",
            "lepton.mse",
            "lepton.mae",
            "lepton.r2",
            "lepton.accuracy",
            "lepton.precision",
            "lepton.recall",
            "lepton.f1",
        ),
    ),
    "lepton.register": Convention(
        "driver", "Recording a version.", ("lepton.model", "lepton.checkpoint", "lepton.version")
    ),
    "lepton.promote": Convention("driver", "A call of promote().", _VERSION),
    "lepton.gate": Convention("driver", "Checking the gates.", (*_VERSION, "lepton.gate")),
    "lepton.canary": Convention(
        "driver", "A canary or shadow at one share.", (*_VERSION, "lepton.share")
    ),
    "lepton.score": Convention("driver", "Answers for a whole table.", (*_VERSION, "lepton.table")),
    "lepton.rollback": Convention(
        "driver", "Taking a version back: by rollback(), or because a trial failed.", _VERSION
    ),
    "lepton.abort": Convention("driver", "A call of abort().", _VERSION),
    "lepton.pause": Convention("driver", "A call of pause().", _VERSION),
    "lepton.model.load": Convention("replica", "Loading and trying out a version.", _VERSION),
    "lepton.batch": Convention(
        "replica",
        "What was run for a slow or failed request, and for one of a second's others that wait for "
        "a batch, with all that was run together; before it the request waited.",
        ("lepton.requests", "lepton.rows"),
    ),
    "lepton.model.run": Convention("replica", "The model's run in such a batch."),
    "lepton.request": Convention(
        "replica",
        "An inference request, from its headers until its answer is formed, over HTTP or by gRPC. "
        "Its status is an error where the server failed; what a client got wrong has error.type.",
        (
            *_VERSION,
            "http.request.method",
            "http.response.status_code",
            "http.route",
            "url.path",
            "url.scheme",
            "rpc.system",
            "rpc.service",
            "rpc.method",
            "rpc.grpc.status_code",
            "lepton.variant",
            "lepton.rows",
            "lepton.checkpoint.trace",
            "lepton.deployment.trace",
        ),
    ),
}


def strays(name: str, attributes: Iterable[str]) -> list[str]:
    """Return what about a span is in no table: its name, or some of its attributes."""
    known = SPANS.get(name)
    if known is None:
        return [name]
    allowed = {*(ON_ALL[:1] if name in OF_REQUESTS else ON_ALL), *known.attributes}
    return sorted(f"{name}: {a}" for a in attributes if a not in allowed)
