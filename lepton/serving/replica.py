"""A replica: follows the registry's pointer and answers requests. Runs inside Ray Serve.

Invariant: a version answers only after its files matched their hashes and it answered a row of
zeros; a version that cannot be loaded changes nothing for requests. Weights come and go by
swapping one reference; the former champion stays resident, so going back is as quick.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from ray.util import metrics as ray_metrics
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lepton import checkpoints, telemetry
from lepton.errors import LeptonError
from lepton.export.restore import Predictor
from lepton.registry import Pointer, Registry
from lepton.serving.answers import Answer, AnswerLog
from lepton.serving.forms import inquiry_in, problem, reply_to
from lepton.serving.inputs import BadRequest, Input, datatype_of, input_of
from lepton.serving.protocol import Inquiry
from lepton.telemetry import Carrier, carrier_of

FOLLOW_S = 0.25
SLOW_S = 1.0
"""From when on a request is slow: its span is recorded though its trace is not sampled."""

log = logging.getLogger("lepton")


@dataclass(frozen=True)
class Resident:
    """A version in memory."""

    version: int
    predictor: Predictor
    inputs: tuple[Input, ...]
    traceparent: str
    baggage: str

    @property
    def outputs(self) -> list[str]:
        """The names of what it gives."""
        return [s.name for s in self.predictor.signature.outputs]


@dataclass(frozen=True)
class Serving:
    """Who answers now; replaced as a whole."""

    champion: Resident
    canary: Resident | None
    share: float
    seq: int


class Replica:
    """One replica of one model's application."""

    def __init__(self, model: str, home: str, trace: Carrier | None = None) -> None:
        import torch

        torch.set_num_threads(1)
        telemetry.name_process(f"replica {model}")
        telemetry.scrape_by(ray_metrics)
        self._model = model
        self._trace = trace or Carrier("", f"{home}/traces")
        self._registry = Registry(f"{home}/registry")
        self._resident: dict[int, Resident] = {}
        self._error = ""
        self._failed_seq = 0
        self._active = 0
        self._serving = self._load(self._registry.state(model).pointer)
        self._answers = AnswerLog(f"{home}/answers/{model}", model)
        labels = {"lepton.model": model}
        self._unwatch = telemetry.watch("lepton.serving.queue_depth", lambda: self._active, labels)
        self._forget_logs = telemetry.keep_logs(self._trace, lambda: labels)
        self._following, self._stop = threading.Lock(), threading.Event()
        threading.Thread(target=self._keep_following, daemon=True).start()

    def __serve_build_asgi_app__(self) -> Starlette:
        base = f"/v2/models/{self._model}"
        one = f"{base}/versions/{{version}}"
        return Starlette(
            routes=[
                Route("/v2", self.server),
                Route("/v2/health/live", self.live),
                Route("/v2/health/ready", self.live),
                *(Route(at, self.metadata) for at in (base, one)),
                *(Route(f"{at}/ready", self.ready) for at in (base, one)),
                *(Route(f"{at}/infer", self.infer, methods=["POST"]) for at in (base, one)),
            ],
            exception_handlers={HTTPException: self.missed, BadRequest: self.refused},
        )

    # -- following the pointer ------------------------------------------------------------------

    async def follow(self) -> dict[str, Any]:
        """Take up the newest pointer; return what is served and what went wrong, if anything."""
        await asyncio.to_thread(self._follow)
        now = self._serving
        return {
            "seq": max(now.seq, self._failed_seq),
            "champion": now.champion.version,
            "canary": now.canary.version if now.canary else None,
            "share": now.share,
            "error": self._error,
        }

    def _keep_following(self) -> None:
        while not self._stop.wait(FOLLOW_S):
            self._follow()

    def _follow(self) -> None:
        with self._following:
            self._take_up()

    def _take_up(self) -> None:
        try:
            pointer = self._registry.state(self._model).pointer
            if pointer.seq > max(self._serving.seq, self._failed_seq):
                try:
                    self._serving = self._load(pointer)
                    self._error = ""
                except LeptonError as e:
                    self._failed_seq, self._error = pointer.seq, str(e)
                    log.warning(
                        "replica of %s keeps version %s: %s",
                        self._model,
                        self._serving.champion.version,
                        e,
                    )
        except LeptonError as e:
            log.warning("replica of %s cannot read the registry: %s", self._model, e)

    def _load(self, pointer: Pointer) -> Serving:
        if pointer.champion is None:
            raise LeptonError(f"model {self._model!r} has no champion: promote a version first")
        champion = self._version(pointer.champion)
        canary = self._version(pointer.canary) if pointer.canary is not None else None
        keep = {pointer.champion, pointer.canary, pointer.previous}
        self._resident = {v: r for v, r in self._resident.items() if v in keep}
        return Serving(champion, canary, pointer.share or 0.0, pointer.seq)

    def _version(self, number: int) -> Resident:
        if number not in self._resident:
            began = time.time_ns()
            self._resident[number] = self._warm(number)
            telemetry.record(
                "lepton.model.load", self._trace, began, attributes={"lepton.version": number}
            )
            seconds = (time.time_ns() - began) / 1e9
            telemetry.measure("lepton.model.load.duration", seconds, {"lepton.model": self._model})
        return self._resident[number]

    def _warm(self, number: int) -> Resident:
        entry = self._registry.version(self._model, number)
        manifest = checkpoints.load(entry.checkpoint)
        if manifest.sha256 != entry.manifest_sha256:
            raise LeptonError(
                f"checkpoint {entry.checkpoint} is not the one that was registered as "
                f"{self._model} version {number}: its manifest has changed"
            )
        predictor = Predictor(manifest)
        types = manifest.lineage.get("types", {})
        filled = predictor.filled
        inputs = tuple(
            input_of(s.name, types.get(s.name, s.dtype), s.shape, nullable=s.name in filled)
            for s in predictor.signature.inputs
        )
        lineage = manifest.lineage
        words = {
            "lepton.model": self._model,
            "lepton.version": number,
            "lepton.run": lineage.get("run", ""),
            "lepton.table": f"{lineage.get('table')}@{lineage.get('table_version')}",
        }
        baggage = Carrier().with_baggage(words).baggage
        return Resident(number, predictor, inputs, manifest.traceparent, baggage)

    # -- requests -------------------------------------------------------------------------------

    async def server(self, _: Request) -> Response:
        """Server metadata."""
        told = {"name": "lepton", "version": "2", "extensions": ["binary_tensor_data"]}
        return JSONResponse(told)

    async def live(self, _: Request) -> Response:
        """Answer 200: a replica that can answer this can answer requests."""
        return Response(status_code=200)

    async def ready(self, request: Request) -> Response:
        """Answer 200 if the model, or the version that is named, is in memory."""
        self._chosen(request)
        return Response(status_code=200)

    async def metadata(self, request: Request) -> Response:
        """Model metadata, of the champion if no version is named."""
        version = self._chosen(request, by_chance=False)[0]
        outputs = [
            {"name": s.name, "datatype": _datatype(s.dtype), "shape": [-1, *s.shape]}
            for s in version.predictor.signature.outputs
        ]
        return JSONResponse(
            {
                "name": self._model,
                "versions": [str(v) for v in sorted(self._resident)],
                "platform": "pytorch_torch_export",
                "inputs": [i.describe() for i in version.inputs],
                "outputs": outputs,
            }
        )

    async def missed(self, request: Request, error: Exception) -> Response:
        """Say what there is, to a request for something else."""
        status = error.status_code if isinstance(error, HTTPException) else 404
        detail = (
            f"there is no {request.method} {request.url.path} here: "
            f"inference is POST /v2/models/{self._model}/infer"
        )
        return problem(status, detail)

    async def refused(self, _: Request, error: Exception) -> Response:
        """Say what the client got wrong."""
        return problem(error.status if isinstance(error, BadRequest) else 400, str(error))

    def _chosen(self, request: Request, *, by_chance: bool = True) -> tuple[Resident, str]:
        """Return the version that answers, and as what: champion, canary or pinned by the client.

        Raises:
            BadRequest: the version that is named is not in memory (404).
        """
        now = self._serving
        named = request.path_params.get("version")
        if named is None:
            if by_chance and now.canary and random.random() < now.share:  # noqa: S311 - a coin
                return now.canary, "canary"
            return now.champion, "champion"
        resident = self._resident
        found = next((r for number, r in resident.items() if str(number) == named), None)
        if found is None:
            raise BadRequest(
                f"version {named} of model {self._model!r} is not in memory: versions "
                f"{sorted(resident)} are",
                404,
            )
        roles = {now.champion.version: "champion"}
        if now.canary:
            roles[now.canary.version] = "canary"
        return found, roles.get(found.version, "pinned")

    async def infer(self, request: Request) -> Response:
        """Answer one inference request."""
        self._active += 1
        try:
            return await self._infer(request)
        finally:
            self._active -= 1

    async def _infer(self, request: Request) -> Response:
        began = time.time_ns(), time.perf_counter()
        chosen, variant = self._chosen(request)
        inquiry: Inquiry | None = None
        outputs: dict[str, np.ndarray[Any, Any]] = {}
        error, status, failure = "", 200, None
        try:
            inquiry = await inquiry_in(request, chosen.inputs, chosen.outputs)
            outputs = await asyncio.to_thread(_answer, chosen.predictor, inquiry.rows)
        except BadRequest as e:
            status, error = e.status, str(e)
        except Exception as e:  # noqa: BLE001 - answered with 500 and logged
            status, error, failure = 500, f"{type(e).__name__}: {e}", e
        identity = (inquiry.identity if inquiry else "") or uuid.uuid4().hex
        span = self._spanned(request, chosen, variant, (began[0], status, error, inquiry))
        if failure is not None:
            log.error(
                "replica of %s failed a request",
                self._model,
                exc_info=failure,
                extra={"carrier": span},
            )
        if status == 200 or status >= 500:
            self._answers.add(
                Answer(
                    request_id=identity,
                    time_us=began[0] // 1000,
                    version=chosen.version,
                    variant=variant,
                    status=status,
                    trace_id=span.trace_id,
                    latency_ms=(time.perf_counter() - began[1]) * 1e3,
                    rows=inquiry.rows if inquiry and status == 200 else None,
                    outputs=outputs,
                )
            )
        if inquiry is None or status != 200:
            reply = problem(status, error)
        else:
            reply = reply_to(request, inquiry, (self._model, chosen.version), identity, outputs)
        reply.headers["traceparent"] = span.traceparent
        reply.headers["baggage"] = chosen.baggage
        reply.headers["x-lepton-version"] = str(chosen.version)
        return reply

    def _spanned(
        self,
        request: Request,
        chosen: Resident,
        variant: str,
        came: tuple[int, int, str, Inquiry | None],
    ) -> Carrier:
        """Record a request's span: when it began, its status, error and what was asked."""
        began_ns, status, error, inquiry = came
        parent = carrier_of(
            request.headers.get("traceparent"),
            self._trace.directory,
            Carrier("", self._trace.directory),
            baggage=request.headers.get("baggage"),
        )
        kind = "BadRequest" if 400 <= status < 500 else error.split(":")[0]
        rows = len(inquiry.rows) if inquiry else 0
        took = (time.time_ns() - began_ns) / 1e9
        span = telemetry.record(
            "lepton.request",
            parent,
            began_ns,
            kind="server",
            error=kind or None,
            certain=status >= 500 or took > SLOW_S,
            links=[chosen.traceparent],
            attributes={
                "http.request.method": "POST",
                "http.response.status_code": status,
                "lepton.model": self._model,
                "lepton.version": chosen.version,
                "lepton.variant": variant,
                "lepton.rows": rows,
                "lepton.checkpoint.trace": chosen.traceparent,
            },
        )
        if telemetry.measuring():
            labels = {
                "http.request.method": "POST",
                "http.response.status_code": status,
                "lepton.model": self._model,
                "lepton.version": chosen.version,
                "lepton.variant": variant,
                **({"error.type": kind} if kind else {}),
            }
            trace = span.traceparent
            telemetry.measure("http.server.request.duration", took, labels, trace=trace)
            labels = {"lepton.model": self._model}
            telemetry.measure("lepton.serving.batch_size", rows, labels, trace=trace)
        return span

    def __del__(self) -> None:
        """Ray Serve calls this when a replica is stopped in good order: commit what waits."""
        answers = getattr(self, "_answers", None)
        if answers is not None:
            self._stop.set()
            self._unwatch()
            self._forget_logs()
            answers.close()
        telemetry.flush()


def _answer(predictor: Predictor, rows: pa.Table) -> dict[str, np.ndarray[Any, Any]]:
    return {name: value.numpy() for name, value in predictor(rows).items()}


def _datatype(dtype: str) -> str:
    """The protocol's name of a dtype that torch names."""
    return "BF16" if dtype == "bfloat16" else datatype_of(np.dtype(dtype))
