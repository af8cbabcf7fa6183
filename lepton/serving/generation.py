"""``generate`` and ``generate_stream``: the requests of sequence models, and what is left of them.

A stream's span and its row in the inference log are made at its end; the last event names them.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from lepton.serving.answers import Answer, AnswerLog
from lepton.serving.batching import Batcher, Overloaded
from lepton.serving.following import Resident
from lepton.serving.forms import problem
from lepton.serving.inputs import BadRequest
from lepton.serving.outcome import SLOW_NS, baggage_of, call_of, request_span
from lepton.serving.protocol import patience_of
from lepton.serving.sequences import EVENTS, LINES, Wish, event_of, sequence_of, shown, wish_of
from lepton.serving.streaming import body_of, next_of, tokens_of, until_left
from lepton.telemetry import Spool, traceparent_in

NAME = "lepton.request"
LEFT = 499  # as nginx has it: the client closed the connection


@dataclass
class _Stream:
    """One answer under way.

    Attributes:
        asked: the request's headers.
        call: its path, or the method that was called by gRPC.
        above: the traceparent that came. span: of the request's own span.
        slowest_ns: the longest that its client waited for a token.
    """

    version: Resident
    variant: str
    identity: str
    began_ns: int
    wish: Wish | None = None
    status: int = 200
    error: str = ""
    tokens: list[int] = field(default_factory=list[int])
    begun: bool = False
    asked: Mapping[bytes, bytes] = field(default_factory=dict[bytes, bytes])
    call: str = ""
    above: str = ""
    span: str = ""
    token_ns: int = 0
    slowest_ns: int = 0

    @property
    def is_slow(self) -> bool:
        """Whether its client waited long for a token, or for the whole answer."""
        whole_ns = 0 if self.begun else time.time_ns() - self.began_ns
        return max(self.slowest_ns, whole_ns) > SLOW_NS

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """What each of its answers says, whatever it is; Ray Serve adds ``x-request-id``."""
        return [
            (b"traceparent", self.span.encode()),
            (b"baggage", baggage_of(self.asked.get(b"baggage"), self.version).encode()),
            (b"x-lepton-version", str(self.version.version).encode()),
        ]

    def took(self) -> None:
        """Note that a token came, or the end."""
        now = time.time_ns()
        self.slowest_ns = max(self.slowest_ns, now - (self.token_ns or self.began_ns))
        self.token_ns = now


class Generation:
    """Answers a replica's requests for sequences.

    Args:
        model: its name.
        choose: says which version answers a request, and as what.
        batcher, answers, spans: of the replica.
    """

    def __init__(
        self,
        model: str,
        choose: Callable[[Request], tuple[Resident, str]],
        *,
        batcher: Batcher,
        answers: AnswerLog,
        spans: Spool,
    ) -> None:
        self._model = model
        self._path = re.compile(
            rf"/v2/models/{re.escape(model)}(/versions/(?P<version>[^/]+))?/generate(?P<stream>_stream)?"
        )
        self._choose = choose
        self._batcher = batcher
        self._answers = answers
        self._spans = spans

    def before(self, app: Any) -> Any:
        """Return an ASGI application that answers these requests, and leaves others to ``app``."""

        async def either(scope: Any, receive: Any, send: Any) -> None:
            found = self._asked(scope)
            if found:
                await self._answer({**scope, "path_params": found.groupdict()}, receive, send)
            else:
                await app(scope, receive, send)

        return either

    def _asked(self, scope: Any) -> re.Match[str] | None:
        """What a path asks for, if for a sequence; ``version`` is None where none is named."""
        if scope.get("method") != "POST":
            return None
        return self._path.fullmatch(scope["path"].removeprefix(scope.get("root_path", "")))

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope)
        whole = not scope["path_params"]["stream"]
        form = "" if whole else LINES if LINES in request.headers.get("accept", "") else EVENTS
        try:
            version, variant = self._choose(request)
        except BadRequest as e:
            await problem(e.status, str(e))(scope, receive, send)
            return
        identity = f"{random.getrandbits(128):032x}"
        stream = _Stream(version, variant, identity, time.time_ns(), call=call_of(scope))
        stream.asked = dict(scope["headers"])
        stream.above = traceparent_in(stream.asked.get(b"traceparent"))
        stream.span = self._spans.begin(NAME, stream.above)
        try:
            spec = sequence_of(version.inputs, version.predictor.signature.outputs)
            wish = wish_of(await body_of(receive), spec)
            patience_s = patience_of(request.headers, wish.patience_s)
            stream.wish = replace(wish, patience_s=patience_s)
            stream.identity = stream.wish.identity or identity
            await self._send_all(stream, stream.wish, form, receive, send)
        except BadRequest as e:
            stream.status, stream.error = e.status, "" if e.status == LEFT else type(e).__name__
            self._record(stream)
            if e.status != LEFT:
                await _refuse(stream, str(e))(scope, receive, send)
        except ConnectionError:
            stream.status = LEFT
            self._record(stream)
        except asyncio.CancelledError:  # by a server that says so instead
            stream.status = LEFT
            self._record(stream)
            raise
        except Exception as e:  # noqa: BLE001 - told to the client
            await self._fail(request, stream, e, form, send)
        else:
            await _finish(send, stream, self._end(stream), form)

    async def _send_all(
        self, stream: _Stream, wish: Wish, form: str, receive: Any, send: Any
    ) -> None:
        left = asyncio.create_task(until_left(receive))
        try:
            async with aclosing(tokens_of(stream.version, wish, self._batcher)) as tokens:
                while (token := await next_of(tokens, left)) is not None:
                    stream.took()
                    stream.tokens.append(token)
                    if form:
                        await self._send_token(stream, token, form, send)
            stream.took()
            if form and not stream.begun:
                await self._begin(stream, form, send)
        finally:
            left.cancel()

    async def _begin(self, stream: _Stream, form: str, send: Any) -> None:
        stream.begun = True
        headers = [
            (b"content-type", form.encode()),
            (b"cache-control", b"no-store"),
            *stream.headers,
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _send_token(self, stream: _Stream, token: int, form: str, send: Any) -> None:
        if not stream.begun:
            await self._begin(stream, form, send)
        told = {"id": stream.identity, "index": len(stream.tokens) - 1, "token": token}
        body = event_of(told, form)
        await send({"type": "http.response.body", "body": body, "more_body": True})

    def _end(self, stream: _Stream) -> dict[str, Any]:
        self._record(stream)
        wish = stream.wish
        full = wish is not None and len(stream.tokens) == wish.max_tokens
        return {
            "model_name": self._model,
            "model_version": str(stream.version.version),
            "id": stream.identity,
            "tokens": stream.tokens,
            "finish_reason": "length" if full else "stop",
            "traceparent": stream.span,
        }

    async def _fail(
        self, request: Request, stream: _Stream, error: Exception, form: str, send: Any
    ) -> None:
        """Tell what went wrong, by a status or, after the beginning, by the last event."""
        stream.error, detail = type(error).__name__, f"{type(error).__name__}: {error}"
        stream.status = 500
        if isinstance(error, Overloaded):
            stream.status, detail = 503, str(error)
        elif isinstance(error, TimeoutError):
            stream.status, detail = 504, "the request's time was over before it was answered"
        self._record(stream)
        if stream.begun:
            told = {"id": stream.identity, "error": detail, "status": stream.status}
            await _finish(send, stream, told, form)
            return
        reply = _refuse(stream, detail)
        if isinstance(error, Overloaded):
            reply.headers["retry-after"] = str(error.retry_after_s)
        await reply(request.scope, request.receive, send)

    def _record(self, stream: _Stream) -> None:
        """Leave the span and the row of the inference log."""
        about = {
            "lepton.model": self._model,
            "lepton.version": stream.version.version,
            "lepton.variant": stream.variant,
            "lepton.rows": len(stream.tokens),
        }
        self._spans.leave(
            request_span(about, stream.version, stream.call, stream.status, stream.error),
            stream.above,
            *(stream.began_ns, time.time_ns()),
            certain=stream.status >= 500 or stream.is_slow,
            own=stream.span,
        )
        if stream.status in (200, 500, 504) and stream.wish is not None:
            self._answers.add(self._row(stream, stream.wish))

    def _row(self, stream: _Stream, wish: Wish) -> Answer:
        version, good = stream.version, stream.status == 200
        first = version.predictor.signature.outputs[0]
        tokens = np.array([stream.tokens], "int64")
        return Answer(
            request_id=stream.identity,
            time_us=stream.began_ns // 1000,
            version=version.version,
            variant=stream.variant,
            status=stream.status,
            trace_id=stream.span[3:35],
            latency_ms=(time.time_ns() - stream.began_ns) / 1e6,
            rows=shown(wish.prompt, version.inputs[0], first) if good else None,
            outputs={"tokens": tokens} if good and stream.tokens else {},
        )


def _refuse(stream: _Stream, detail: str) -> Response:
    """Return what is answered instead of tokens."""
    reply = problem(stream.status, detail)
    reply.raw_headers.extend(stream.headers)
    return reply


async def _finish(send: Any, stream: _Stream, told: dict[str, Any], form: str) -> None:
    """Send the last event, or the whole answer."""
    if form:
        await send({"type": "http.response.body", "body": event_of(told, form)})
        return
    body = event_of(told, LINES)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *stream.headers,
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
