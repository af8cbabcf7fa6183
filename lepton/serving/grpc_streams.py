"""``ModelStreamInfer``: requests come one after another over one call, and so do their answers.

Answers come in the order of the requests, though several requests are under way at once, so that
they are run together. One that fails is answered by a message with the error, and the stream goes
on. A request with the parameter ``max_tokens`` asks a sequence model to go on from the tokens that
it sends: each token is an answer of its own, and an empty answer ends it, with the parameter
``triton_final_response``, as Triton's clients know it from decoupled models.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Any

import numpy as np
import orjson

from lepton.serving.grpc_messages import MESSAGES, body_of, parameters_of
from lepton.serving.inputs import BadRequest, dtype_of
from lepton.serving.sequences import LINES

AHEAD = 8
"""Requests of one stream that are under way at once."""
FINAL = "triton_final_response"

One = Callable[[Any], Awaitable[Any]]
Many = Callable[[Any], AsyncGenerator[Any]]


async def answers_of(requests: AsyncIterable[Any], one: One, many: Many) -> AsyncGenerator[Any]:
    """Answer a stream of requests, in their order.

    Args:
        requests: as they come.
        one: answers a request by one message.
        many: answers one that wants tokens, by several messages.
    """
    ahead: asyncio.Queue[tuple[Any, asyncio.Task[Any] | None] | None] = asyncio.Queue(AHEAD)
    running: set[asyncio.Task[Any]] = set()

    async def read() -> None:
        try:
            async for request in requests:
                task = None if wants_tokens(request) else asyncio.ensure_future(one(request))
                if task is not None:
                    running.add(task)
                    task.add_done_callback(running.discard)
                await ahead.put((request, task))
        except Exception:
            await ahead.put(None)  # who waits for the next one must not wait for ever
            raise
        await ahead.put(None)

    reader = asyncio.create_task(read())
    reader.add_done_callback(lambda done: done.cancelled() or done.exception())  # it was looked at
    try:
        while (item := await ahead.get()) is not None:
            request, task = item
            if task is not None:
                yield await task
                continue
            async with aclosing(many(request)) as messages:
                async for message in messages:
                    yield message
    finally:
        for task in (reader, *running):
            task.cancel()


def wants_tokens(request: Any) -> bool:
    """Whether a request asks to go on from a sequence."""
    return "max_tokens" in request.parameters


def sequence_request_of(request: Any) -> bytes:
    """Return the body of ``generate_stream`` for a request that wants tokens.

    Raises:
        BadRequest: it has not exactly one input, of whole numbers.
    """
    if len(request.inputs) != 1 or "INT" not in request.inputs[0].datatype:
        raise BadRequest("a request with 'max_tokens' takes one input of whole numbers: the tokens")
    (tensor,) = request.inputs
    body, length = body_of(request)
    try:
        tokens = np.frombuffer(body[length:], dtype_of(tensor.datatype)).tolist()
    except (ValueError, KeyError) as e:
        raise BadRequest(f"input {tensor.name!r} is not {tensor.datatype}: {e}") from e
    told = {n: v for n, v in parameters_of(request).items() if not n.startswith("triton_")}
    return orjson.dumps({tensor.name: tokens, "parameters": told, "id": request.id})


def failure_of(request: Any, detail: str) -> Any:
    """Return the message that tells what went wrong with a request."""
    about = MESSAGES["ModelInferResponse"](model_name=request.model_name, id=request.id)
    return MESSAGES["ModelStreamInferResponse"](error_message=detail, infer_response=about)


def success_of(answer: Any) -> Any:
    """Return the message with a request's answer."""
    return MESSAGES["ModelStreamInferResponse"](infer_response=answer)


def token_message_of(request: Any, line: bytes, version: str) -> Any:
    """Return the message for an event of ``generate_stream``: a token, an error or the end."""
    told = orjson.loads(line)
    if "error" in told:
        return failure_of(request, str(told["error"]))
    answer = MESSAGES["ModelInferResponse"](
        model_name=request.model_name, model_version=version, id=told["id"]
    )
    answer.parameters[FINAL].bool_param = "token" not in told
    if "token" in told:
        answer.parameters["index"].int64_param = told["index"]
        answer.outputs.add(name="token", datatype="INT64", shape=[1])
        answer.raw_output_contents.append(int(told["token"]).to_bytes(8, "little", signed=True))
    else:
        answer.parameters["finish_reason"].string_param = told["finish_reason"]
        answer.parameters["traceparent"].string_param = told["traceparent"]
    return success_of(answer)


async def tokens_from(
    app: Any, scope: Mapping[str, Any], body: bytes, request: Any
) -> AsyncGenerator[Any]:
    """Ask an ASGI application for tokens; yield a message for each, as it comes.

    Whoever stops asking stops the application, too.
    """
    sent: asyncio.Queue[Any] = asyncio.Queue()
    unread = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if unread:
            return unread.pop()
        return await asyncio.get_running_loop().create_future()  # until it is cancelled

    async def run() -> None:
        try:
            await app(dict(scope), receive, sent.put)
        finally:
            sent.put_nowait(None)

    task = asyncio.create_task(run())
    status, version, rest = 0, "", b""
    try:
        while (message := await sent.get()) is not None:
            if message["type"] == "http.response.start":
                status = message["status"]
                told = dict(message["headers"])
                version = told.get(b"x-lepton-version", b"").decode()
                continue
            *lines, rest = (rest + message.get("body", b"")).split(b"\n")
            for line in lines if status == 200 else ():
                yield token_message_of(request, line, version)
        if status != 200:
            yield failure_of(request, detail_of(rest, status))
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def detail_of(body: bytes, status: int) -> str:
    """Return what an answer in problem details says."""
    try:
        return str(orjson.loads(body)["detail"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP status {status}"


HEADERS: Mapping[str, str] = {"accept": LINES, "content-type": "application/json"}
"""Of a request for tokens."""
