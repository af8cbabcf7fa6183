"""The Open Inference Protocol over gRPC, inside a replica.

Each call is asked of the replica's own ASGI application, in its event loop, without a network in
between. All replicas of a node listen on one port: the kernel gives each new connection to one of
them, so that clients that stay connected stay with a replica. (Serve's gRPC proxy was not taken:
it is in Python, HAProxy does not replace it, and it wants to be told the application's name.)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc  # pyright: ignore[reportMissingTypeStubs]
import orjson

from lepton.errors import ServingError
from lepton.serving.grpc_messages import MESSAGES, SERVICE, answer_of, body_of
from lepton.serving.grpc_streams import (
    HEADERS,
    answers_of,
    detail_of,
    failure_of,
    sequence_request_of,
    success_of,
    tokens_from,
)
from lepton.serving.inputs import MAX_BYTES, BadRequest
from lepton.serving.outcome import RPC

LENGTH = "inference-header-content-length"
GRACE_S = 10.0
CODES: Mapping[int, Any] = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
TOLD = ("traceparent", "baggage", "x-lepton-version", "x-lepton-replica", "retry-after")
"""Headers of an answer that a gRPC client gets as initial metadata."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the application answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Listener:
    """A gRPC server before an ASGI application.

    Args:
        app: answers ``/v2/...`` over HTTP.
        model: the name of the one model it has.
    """

    def __init__(self, app: Any, model: str) -> None:
        self._app = app
        self._model = model
        self._server: Any = None

    async def listen(self, address: str) -> None:
        """Begin to answer at host:port, beside other processes that do.

        Raises:
            ServingError: the port is taken by something else.
        """
        calls: Mapping[str, Callable[[Any, Any], Any]] = {
            "ServerLive": self._live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelInfer": self._infer,
        }
        make: Any = grpc.unary_unary_rpc_method_handler
        handlers = {
            name: make(
                call,
                request_deserializer=MESSAGES[f"{name}Request"].FromString,
                response_serializer=MESSAGES[f"{name}Response"].SerializeToString,
            )
            for name, call in calls.items()
        }
        stream: Any = grpc.stream_stream_rpc_method_handler
        handlers["ModelStreamInfer"] = stream(
            self._stream,
            request_deserializer=MESSAGES["ModelInferRequest"].FromString,
            response_serializer=MESSAGES["ModelStreamInferResponse"].SerializeToString,
        )
        options = [
            ("grpc.so_reuseport", 1),
            ("grpc.max_receive_message_length", MAX_BYTES + 2**20),
            ("grpc.max_send_message_length", -1),
        ]
        server: Any = grpc.aio.server(options=options)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        try:
            server.add_insecure_port(address)
            await server.start()
        except RuntimeError as e:
            raise ServingError(
                f"model {self._model!r} cannot be served by gRPC at {address}: {e}; name another "
                "grpc_port"
            ) from e
        self._server = server

    async def close(self) -> None:
        """Take no more calls; those under way get :data:`GRACE_S` to end."""
        if self._server is not None:
            await self._server.stop(GRACE_S)

    async def _live(self, _: Any, context: Any) -> Any:
        reply = await self._get("/v2/health/live", context)
        return MESSAGES["ServerLiveResponse"](live=reply.status == 200)

    async def _server_ready(self, _: Any, context: Any) -> Any:
        reply = await self._get("/v2/health/ready", context)
        return MESSAGES["ServerReadyResponse"](ready=reply.status == 200)

    async def _model_ready(self, request: Any, context: Any) -> Any:
        path = _path(request.name, request.version)
        reply = await self._get(f"{path}/ready", context)
        if reply.status not in (200, 404):
            await _refuse(context, reply)
        return MESSAGES["ModelReadyResponse"](ready=reply.status == 200)

    async def _server_metadata(self, _: Any, context: Any) -> Any:
        told = await self._known("/v2", context)
        return MESSAGES["ServerMetadataResponse"](**told)

    async def _model_metadata(self, request: Any, context: Any) -> Any:
        told = await self._known(_path(request.name, request.version), context)
        return MESSAGES["ModelMetadataResponse"](**told)

    async def _infer(self, request: Any, context: Any) -> Any:
        try:
            reply = await self._asked(request, context, "ModelInfer")
        except BadRequest as e:
            await context.abort(CODES[400], str(e))
            raise AssertionError from e  # abort() always raises
        told = [(name, reply.headers[name]) for name in TOLD if name in reply.headers]
        await context.send_initial_metadata(told)
        if reply.status != 200:
            await _refuse(context, reply)
        return answer_of(reply.body, int(reply.headers[LENGTH]))

    async def _asked(self, request: Any, context: Any, method: str) -> Reply:
        """Ask for one inference, as that method of the protocol does.

        Raises:
            BadRequest: the message cannot be a request.
        """
        body, length = body_of(request, context.time_remaining())
        headers = {LENGTH: str(length), "content-length": str(len(body))}
        path = _path(request.model_name, request.model_version)
        given = {**_given(context), **headers}
        return await ask(self._app, "POST", f"{path}/infer", given, body, rpc=RPC + method)

    async def _stream(self, requests: Any, context: Any) -> AsyncGenerator[Any]:
        async def one(request: Any) -> Any:
            try:
                reply = await self._asked(request, context, "ModelStreamInfer")
            except BadRequest as e:
                return failure_of(request, str(e))
            if reply.status == 401:  # so is all that this stream asks
                await _refuse(context, reply)
            if reply.status != 200:
                return failure_of(request, detail_of(reply.body, reply.status))
            return success_of(answer_of(reply.body, int(reply.headers[LENGTH])))

        async def many(request: Any) -> AsyncGenerator[Any]:
            path = _path(request.model_name, request.model_version)
            try:
                body = sequence_request_of(request)
            except BadRequest as e:
                yield failure_of(request, str(e))
                return
            headers = {**_given(context), **HEADERS, "content-length": str(len(body))}
            scope = _scope("POST", f"{path}/generate_stream", headers)
            scope["rpc"] = f"{RPC}ModelStreamInfer"
            async with aclosing(tokens_from(self._app, scope, body, request)) as messages:
                async for message in messages:
                    yield message

        async with aclosing(answers_of(requests, one, many)) as answers:
            async for answer in answers:
                yield answer

    async def _known(self, path: str, context: Any) -> Any:
        reply = await self._get(path, context)
        if reply.status != 200:
            await _refuse(context, reply)
        return orjson.loads(reply.body)

    async def _get(self, path: str, context: Any) -> Reply:
        return await ask(self._app, "GET", path, _given(context))


async def ask(
    app: Any,
    method: str,
    path: str,
    headers: Mapping[str, str],
    body: bytes = b"",
    *,
    rpc: str = "",
) -> Reply:
    """Ask an ASGI application in this event loop; ``rpc`` is the method that was called."""
    scope = {**_scope(method, path, headers), "rpc": rpc}
    unread = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        if unread:
            return unread.pop()
        return await asyncio.get_running_loop().create_future()  # until the call is cancelled

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start = sent[0]
    told = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in start["headers"]}
    return Reply(start["status"], told, b"".join(m.get("body", b"") for m in sent[1:]))


def _given(context: Any) -> dict[str, str]:
    """The headers of a call."""
    return {k: v for k, v in context.invocation_metadata() or () if isinstance(v, str)}


def _scope(method: str, path: str, headers: Mapping[str, str]) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "2",
        "method": method,
        "scheme": "grpc",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(k.lower().encode("latin-1"), _latin(v)) for k, v in headers.items()],
        "client": None,
        "server": None,
    }


def _latin(value: str) -> bytes:
    return value.encode("latin-1", "replace")


def _path(model: str, version: str) -> str:
    return f"/v2/models/{model}" + (f"/versions/{version}" if version else "")


async def _refuse(context: Any, reply: Reply) -> None:
    """End the call with the status that says what HTTP's said."""
    await context.abort(
        CODES.get(reply.status, grpc.StatusCode.INTERNAL), detail_of(reply.body, reply.status)
    )
