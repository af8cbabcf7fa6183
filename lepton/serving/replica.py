"""A replica: answers requests over HTTP, inside Ray Serve or any ASGI server.

Every request is checked before the model sees it, answered by the champion or, by chance, the
canary, recorded as a span and as a row of the inference log. None waits for the lake or a
collector, and none waits without end: what cannot be answered soon is refused with the time after
which to come again.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import time
import traceback
from functools import partial
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lepton import telemetry
from lepton.serving.absence import DRAIN_S, Absence
from lepton.serving.answers import AnswerLog
from lepton.serving.arrays import Arrays
from lepton.serving.batching import Batch, Batcher, Overloaded
from lepton.serving.figures import Figures
from lepton.serving.following import Follower, Resident
from lepton.serving.forms import inquiry_in, problem, reply_to
from lepton.serving.inputs import BadRequest, datatype_of
from lepton.serving.outcome import Keeper, Outcome, baggage_of, call_of
from lepton.serving.plain import openapi_of
from lepton.serving.quick import Quick
from lepton.serving.room import Room
from lepton.serving.scaling import ANSWERED, BUSY, Busy
from lepton.serving.shares import gets_it
from lepton.serving.shortcut import Reply, open_lane
from lepton.telemetry import Carrier, Spool

PATIENCE_S = 60.0
MOST_MIRRORED = 64
_FAILED = "replica of %s failed a request by %s:\n%s"

log = logging.getLogger("lepton")


class Replica:
    """One replica of one model's application.

    Args:
        model: the registered name.
        home: where the registry is.
        trace: the span whose directory keeps its spans.
        threads: that a net computes in, on the CPU.
        room: where it computes, and in how much memory.
        elsewhere: the ingress asks another replica where this one wants it to.
    """

    def __init__(
        self,
        model: str,
        home: str,
        trace: Carrier | None = None,
        threads: int = 1,
        *,
        room: Room | None = None,
        elsewhere: bool = False,
    ) -> None:
        begin = partial(_compute_in, threads)
        begin()
        telemetry.name_process(f"replica {model}")
        self._model = model
        self._name = str(os.getpid())
        carrier = trace or Carrier("", f"{home}/traces")
        self._directory = carrier.directory
        self._absence = Absence(elsewhere=elsewhere)
        self._follower = Follower(model, home, carrier, room)
        self._answers = AnswerLog(f"{home}/answers/{model}", model)
        self._figures = Figures() if telemetry.measuring() else None
        self._spans = Spool(self._directory, self._figures and self._figures.take)
        labels = {"lepton.model": model}
        self._batcher = Batcher(
            begin, lambda rows: telemetry.measure("lepton.serving.batch_size", rows, labels)
        )
        self._draining = False
        self._busy: Busy | None = None  # of the event loop's thread
        self._keeper = Keeper(model, self._directory, self._spans, self._answers)
        self._quick = Quick(model, self._follower, self._batcher, self._keeper, self._absence)
        self._mirrors: set[asyncio.Task[None]] = set()
        depth = lambda: self._batcher.waiting_requests  # noqa: E731
        self._ends = [
            telemetry.watch("lepton.serving.queue_depth", depth, labels),
            telemetry.watch("lepton.serving.alive", time.time, labels),
            telemetry.watch(
                "lepton.serving.rollbacks", lambda: float(self._follower.rollbacks), labels
            ),
            telemetry.watch_gpus(),
            telemetry.keep_logs(carrier, lambda: labels),
        ]
        gc.freeze()  # a look through all that is loaded by now would stop requests for long

    def __serve_build_asgi_app__(self) -> Any:
        return self._absence.before(self._application())

    def _application(self) -> Any:
        base = f"/v2/models/{self._model}"
        one = f"{base}/versions/{{version}}"
        others = Starlette(
            routes=[  # they are tried in this order
                *(Route(f"{at}/infer", self.infer, methods=["POST"]) for at in (base, one)),
                *(Route(f"{at}/predict", self.predict, methods=["POST"]) for at in ("", base, one)),
                Route("/openapi.json", self.openapi),
                Route("/v2", self.server),
                Route("/v2/health/live", self.live),
                Route("/v2/health/ready", self.health),
                *(Route(at, self.metadata) for at in (base, one)),
                *(Route(f"{at}/ready", self.ready) for at in (base, one)),
            ],
            exception_handlers={HTTPException: self.missed, BadRequest: self.refused},
        )

        self._ends.append(open_lane(f"/{self._model}{base}/infer", self.at_once))

        async def app(scope: Any, receive: Any, send: Any) -> None:
            """The path that matters is found at once: routing and its layers cost more than it."""
            path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
            if path == f"{base}/infer" and scope.get("method") == "POST":
                reply = await self.infer(Request(scope, receive))
                await reply(scope, receive, send)
            else:
                await others(scope, receive, send)

        return app

    async def follow(self) -> dict[str, Any]:
        """Take up the newest pointer; return what is served and what went wrong, if anything."""
        return await asyncio.to_thread(self._follower.follow)

    async def replace(self) -> dict[str, Any]:
        """Take up the newest pointer where two versions do not fit into memory; as :meth:`follow`.

        Requests under way are answered first, and others sent elsewhere until it is done.
        """
        try:
            await self._absence.leave()
            # of those who did not wait for it, or were never under way
            while self._mirrors or self._batcher.waiting_rows or self._quick.waiting:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(self._follower.replace)
        except TimeoutError:
            told = f"requests of {self._model!r} were still under way after {DRAIN_S:.0f} s"
            return {**await self.follow(), "error": told}
        finally:
            if not self._follower.lost:
                self._absence.come_back()
        return await self.follow()

    @property
    def lost(self) -> bool:
        """Whether it can answer nobody any more, and has to be started anew."""
        return self._follower.lost

    async def flush(self) -> bool:
        """Commit the inference log and write the spans; return whether the lake took them."""
        await asyncio.to_thread(self._spans.flush)
        return await asyncio.to_thread(self._answers.flush)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Tell Ray Serve how busy this replica is; see :mod:`lepton.serving.scaling`."""
        self._busy = self._busy or Busy()
        return {BUSY: self._busy.share(), ANSWERED: self._quick.answered()}

    async def server(self, _: Request) -> Response:
        """Server metadata."""
        told = {"name": "lepton", "version": "2", "extensions": ["binary_tensor_data"]}
        return JSONResponse(told)

    async def live(self, _: Request) -> Response:
        """Answer 200: a replica that can answer this can answer requests."""
        return Response(status_code=200)

    async def health(self, _: Request) -> Response:
        """Say how this replica is: ready, draining, or failed to take up the newest version.

        One that failed answers 200: it serves the version before.
        """
        follower = self._follower
        leaving = self._draining or self._absence.away
        state = "draining" if leaving else "failed" if follower.error else "ready"
        told = {
            "state": state,
            "version": str(follower.now.champion.version),
            "error": follower.error or None,
            "replica": self._name,
            "device": follower.now.champion.predictor.program.device,
            "waiting_rows": self._batcher.waiting_rows,
            "answers_dropped": self._answers.dropped,
        }
        return JSONResponse(told, status_code=503 if leaving else 200)

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
                "versions": [str(v) for v in sorted(self._follower.resident)],
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
            f"inference is POST /v2/models/{self._model}/infer, or /predict for plain rows"
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
        now = self._follower.now
        named = request.path_params.get("version")
        if named is None:
            if by_chance and now.canary:
                key = request.headers.get(now.by) if now.by else None
                if gets_it(now.share, key, self._model):
                    return now.canary, "canary"
            return now.champion, "champion"
        resident = self._follower.resident
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

    async def openapi(self, _: Request) -> Response:
        """Describe the service."""
        version = self._follower.now.champion
        shapes = {s.name: s.shape for s in version.predictor.signature.outputs}
        return JSONResponse(openapi_of(self._model, version.version, version.inputs, shapes))

    async def predict(self, request: Request) -> Response:
        """Answer a request of plain rows."""
        return await self.infer(request, plain=True)

    async def infer(self, request: Request, *, plain: bool = False) -> Response:
        """Answer one inference request."""
        chosen, variant = self._chosen(request)
        came = Outcome(chosen, variant, time.time_ns(), call=call_of(request.scope))
        await self._answer(request, came, plain=plain)
        given = came.inquiry.identity if came.inquiry else ""
        identity = given or f"{random.getrandbits(128):032x}"
        headers = dict(request.scope["headers"])
        span = self._keeper.span(headers, came)
        if came.failure is not None:
            told = {"carrier": self._keeper.carrier(span)}  # but not its message: it may have rows
            where = "".join(traceback.format_tb(came.failure.__traceback__))
            log.error(_FAILED, self._model, came.kind, where, extra=told)
        if came.status in (200, 500, 504):  # a 503 says nothing about the version: it was not run
            self._keeper.row(came, identity, span)
        if came.variant == "champion" and came.status == 200:
            self._mirror(came, identity, span)
        if came.inquiry is None or came.status != 200:
            reply = problem(came.status, came.error)
        else:
            version = (self._model, chosen.version)
            reply = reply_to(request, came.inquiry, version, identity, came.outputs)
        reply.headers["traceparent"] = span
        reply.headers["baggage"] = baggage_of(headers.get(b"baggage"), chosen)
        reply.headers["x-lepton-version"] = str(chosen.version)
        reply.headers["x-lepton-replica"] = self._name
        if came.retry_after_s is not None:
            reply.headers["retry-after"] = str(came.retry_after_s)
        return reply

    async def _answer(self, request: Request, came: Outcome, *, plain: bool) -> None:
        """Read, check and run a request; what goes wrong is told in ``came``."""
        version = came.version
        try:
            about = version.inputs, version.outputs
            came.inquiry = await inquiry_in(request, *about, plain=plain)
            patience_s = came.inquiry.patience_s or PATIENCE_S
            came.batch = Batch()
            told = version.run, came.inquiry.rows, patience_s, came.batch
            came.outputs = await self._batcher.answer(*told)
        except BadRequest as e:
            came.fail(e.status, e)
        except Overloaded as e:
            came.fail(503, e)
            came.retry_after_s = e.retry_after_s
        except TimeoutError:
            came.fail(504, "the request's time was over before it was answered", "Timeout")
        except Exception as e:  # noqa: BLE001 - answered with 500 and logged
            came.fail(500, f"{type(e).__name__}: {e}", type(e).__name__)
            came.failure = e

    def _mirror(self, came: Outcome, identity: str, span: str) -> None:
        """Ask the shadow the same, if there is one; nobody waits for what it says."""
        now = self._follower.now
        if now.shadow is None or came.inquiry is None or len(self._mirrors) >= MOST_MIRRORED:
            return
        if gets_it(now.share, None, self._model):
            asked = Outcome(now.shadow, "shadow", time.time_ns(), inquiry=came.inquiry)
            task = asyncio.create_task(self._ask_shadow(asked, identity, span))
            self._mirrors.add(task)
            task.add_done_callback(self._mirrors.discard)

    async def _ask_shadow(self, asked: Outcome, identity: str, span: str) -> None:
        assert asked.inquiry is not None  # noqa: S101 - it was just answered
        await asyncio.sleep(0)  # the answer goes out first
        try:
            run, rows = asked.version.run, asked.inquiry.rows
            rows = rows.table() if isinstance(rows, Arrays) else rows
            asked.outputs = await self._batcher.answer(run, rows, PATIENCE_S)
        except (Overloaded, TimeoutError):
            return  # the champion's requests go first
        except Exception as e:  # noqa: BLE001 - counted against the shadow
            asked.fail(500, f"{type(e).__name__}: {e}", type(e).__name__)
        self._keeper.span_within(span, asked)
        self._keeper.row(asked, identity, span)

    async def at_once(self, headers: dict[bytes, bytes], body: bytes) -> Reply | None:
        """Answer a request that needs no second look, as :meth:`infer` would; or leave it."""
        return await self._quick.reply(headers, body)

    def __del__(self) -> None:
        """Ray Serve calls this when a replica is stopped in good order: commit what waits."""
        if getattr(self, "_batcher", None) is not None:  # else it never came up
            self._draining = True
            for end in self._ends:
                end()
            telemetry.measure("lepton.serving.alive", 0, {"lepton.model": self._model})
            self._follower.close()
            self._batcher.close()
            self._answers.close()
            self._spans.close()
            if self._figures is not None:
                self._figures.close()
        telemetry.flush()


def _compute_in(threads: int) -> None:
    """Have torch compute in so many threads; more than its cores would wait for each other."""
    import torch

    torch.set_num_threads(threads)


def _datatype(dtype: str) -> str:
    """The protocol's name of a dtype that torch names."""
    return "BF16" if dtype == "bfloat16" else datatype_of(np.dtype(dtype))
