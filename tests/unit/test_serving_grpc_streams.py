"""Streams over gRPC, without a network: their order, and what is left when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import orjson
import pytest

from lepton.serving.grpc_messages import MESSAGES
from lepton.serving.grpc_streams import AHEAD, answers_of, sequence_request_of, tokens_from
from lepton.serving.inputs import BadRequest


def asked(name: str, **parameters: int) -> Any:
    request = MESSAGES["ModelInferRequest"](id=name, model_name="m")
    for key, value in parameters.items():
        request.parameters[key].int64_param = value
    return request


async def nothing(_: Any) -> AsyncGenerator[Any]:
    raise AssertionError("no tokens were asked for")
    yield


def test_answers_keep_their_order_and_few_requests_are_under_way() -> None:
    under_way, most = 0, 0

    async def requests() -> AsyncIterator[Any]:
        for i in range(50):
            yield asked(str(i))

    async def one(request: Any) -> str:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        for _ in range(-int(request.id) % 7):  # later ones are often quicker
            await asyncio.sleep(0)
        under_way -= 1
        return str(request.id)

    async def scene() -> list[Any]:
        return [answer async for answer in answers_of(requests(), one, nothing)]

    assert asyncio.run(scene()) == [str(i) for i in range(50)]
    assert 1 < most <= AHEAD + 2


def test_who_leaves_has_nothing_done_any_more() -> None:
    ended: list[str] = []

    async def app(_: Any, __: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        line = orjson.dumps({"id": "x", "index": 0, "token": 3})
        await send({"type": "http.response.body", "body": line[:5], "more_body": True})
        await send({"type": "http.response.body", "body": line[5:] + b"\n", "more_body": True})
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.append("tokens")

    async def one(_: Any) -> str:
        try:
            return await asyncio.get_running_loop().create_future()
        finally:
            ended.append("one")

    async def requests() -> AsyncIterator[Any]:
        yield asked("x", max_tokens=9)
        yield asked("y")
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.append("reading")

    async def scene() -> None:
        def many(request: Any) -> AsyncGenerator[Any]:
            return tokens_from(app, {}, b"", request)

        async with aclosing(answers_of(requests(), one, many)) as answers:
            first = await anext(answers)
            assert first.infer_response.raw_output_contents[0] == (3).to_bytes(8, "little")
            while not ended and len(asyncio.all_tasks()) < 4:
                await asyncio.sleep(0)
        async with asyncio.timeout(60):
            while len(asyncio.all_tasks()) > 1:  # those that end
                await asyncio.sleep(0)

    asyncio.run(scene())
    assert {"tokens", "reading"} <= set(ended) <= {"tokens", "reading", "one"}


@pytest.mark.parametrize("wants", [{}, {"max_tokens": 2}], ids=["answers", "tokens"])
def test_requests_that_break_end_the_answers(wants: dict[str, int]) -> None:
    """The answers before are given; nobody waits for more; no task is left."""

    async def requests() -> AsyncIterator[Any]:
        yield asked("x", **wants)
        await asyncio.sleep(0)
        raise ConnectionResetError("the client is gone")

    async def one(request: Any) -> str:
        for _ in range(5):  # the requests break before it is answered
            await asyncio.sleep(0)
        return str(request.id)

    async def many(request: Any) -> AsyncGenerator[Any]:
        for _ in range(5):
            await asyncio.sleep(0)
        yield str(request.id)

    async def scene() -> list[Any]:
        async with asyncio.timeout(60):
            found = [answer async for answer in answers_of(requests(), one, many)]
            while len(asyncio.all_tasks()) > 1:
                await asyncio.sleep(0)
        return found

    assert asyncio.run(scene()) == ["x"]


def test_what_wants_tokens_sends_tokens() -> None:
    request = asked("x", max_tokens=2)
    with pytest.raises(BadRequest, match="takes one input of whole numbers"):
        sequence_request_of(request)
    request.inputs.add(name="x", datatype="INT32", shape=[2])
    request.raw_input_contents.append(b"\1\0\0\0\2\0\0\0")
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    wanted = {"x": [1, 2], "parameters": {"max_tokens": 2}, "id": "x"}
    assert orjson.loads(sequence_request_of(request)) == wanted
    request.raw_input_contents[0] = b"\1\0\0"
    with pytest.raises(BadRequest, match="input 'x' is not INT32"):
        sequence_request_of(request)
