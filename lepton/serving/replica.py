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
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lepton import checkpoints, telemetry
from lepton.errors import LeptonError
from lepton.export.restore import Predictor
from lepton.registry import Pointer, Registry
from lepton.serving.answers import Answer, AnswerLog
from lepton.serving.protocol import BadRequest, Input, input_of, response_of, rows_of
from lepton.telemetry import Carrier, carrier_of

FOLLOW_S = 0.25

log = logging.getLogger("lepton")


@dataclass(frozen=True)
class Resident:
    """A version in memory."""

    version: int
    predictor: Predictor
    inputs: tuple[Input, ...]
    traceparent: str


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
        self._model = model
        self._trace = trace or Carrier("", f"{home}/traces")
        self._registry = Registry(f"{home}/registry")
        self._resident: dict[int, Resident] = {}
        self._error = ""
        self._failed_seq = 0
        self._serving = self._load(self._registry.state(model).pointer)
        self._answers = AnswerLog(f"{home}/answers/{model}", model)
        self._following, self._stop = threading.Lock(), threading.Event()
        threading.Thread(target=self._keep_following, daemon=True).start()

    def __serve_build_asgi_app__(self) -> Starlette:
        base = f"/v2/models/{self._model}"
        return Starlette(
            routes=[
                Route("/v2", self.server),
                Route("/v2/health/live", self.live),
                Route("/v2/health/ready", self.live),
                Route(base, self.metadata),
                Route(f"{base}/ready", self.live),
                Route(f"{base}/infer", self.infer, methods=["POST"]),
            ]
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
        return Resident(number, predictor, inputs, manifest.traceparent)

    # -- requests -------------------------------------------------------------------------------

    async def server(self, _: Request) -> Response:
        """Server metadata."""
        return JSONResponse({"name": "lepton", "version": "2", "extensions": []})

    async def live(self, _: Request) -> Response:
        """Answer 200: a replica that can answer this can answer requests."""
        return Response(status_code=200)

    async def metadata(self, _: Request) -> Response:
        """Model metadata."""
        champion = self._serving.champion
        outputs = [
            {"name": s.name, "datatype": "FP32", "shape": [-1, *s.shape]}
            for s in champion.predictor.signature.outputs
        ]
        return JSONResponse(
            {
                "name": self._model,
                "versions": [str(v) for v in sorted(self._resident)],
                "platform": "pytorch_torch_export",
                "inputs": [i.describe() for i in champion.inputs],
                "outputs": outputs,
            }
        )

    async def infer(self, request: Request) -> Response:
        """Answer one inference request."""
        began_ns, began = time.time_ns(), time.perf_counter()
        now = self._serving
        chosen, variant = now.champion, "champion"
        if now.canary is not None and random.random() < now.share:  # noqa: S311 - a coin, no secret
            chosen, variant = now.canary, "canary"
        parent = carrier_of(
            request.headers.get("traceparent"),
            self._trace.directory,
            Carrier("", self._trace.directory),
        )
        body = await request.body()
        rows: pa.Table | None = None
        outputs: dict[str, np.ndarray[Any, Any]] = {}
        identity, error, status = "", "", 200
        try:
            rows, identity = rows_of(body, chosen.inputs)
            outputs = await asyncio.to_thread(_answer, chosen.predictor, rows)
        except BadRequest as e:
            status, error = 400, str(e)
        except Exception as e:
            status, error = 500, f"{type(e).__name__}: {e}"
            log.exception("replica of %s failed a request", self._model)
        identity = identity or uuid.uuid4().hex
        span = telemetry.record(
            "lepton.request",
            parent,
            began_ns,
            kind="server",
            error="BadRequest" if status == 400 else error.split(":")[0] or None,
            links=[chosen.traceparent],
            attributes={
                "http.request.method": "POST",
                "http.response.status_code": status,
                "lepton.model": self._model,
                "lepton.version": chosen.version,
                "lepton.variant": variant,
                "lepton.rows": len(rows) if rows is not None else 0,
                "lepton.checkpoint.trace": chosen.traceparent,
            },
        )
        headers = {"traceparent": span.traceparent, "x-lepton-version": str(chosen.version)}
        if status != 400:
            self._answers.add(
                Answer(
                    request_id=identity,
                    time_us=began_ns // 1000,
                    version=chosen.version,
                    variant=variant,
                    status=status,
                    trace_id=span.trace_id,
                    latency_ms=(time.perf_counter() - began) * 1e3,
                    rows=rows if status == 200 else None,
                    outputs=outputs,
                )
            )
        if status != 200:
            return JSONResponse({"error": error}, status_code=status, headers=headers)
        content = response_of(self._model, chosen.version, identity, outputs)
        return Response(content, media_type="application/json", headers=headers)

    def __del__(self) -> None:
        """Ray Serve calls this when a replica is stopped in good order: commit what waits."""
        answers = getattr(self, "_answers", None)
        if answers is not None:
            self._stop.set()
            answers.close()
        telemetry.flush()


def _answer(predictor: Predictor, rows: pa.Table) -> dict[str, np.ndarray[Any, Any]]:
    return {name: value.numpy() for name, value in predictor(rows).items()}
