"""Streaming answers: tokens go out as they come, and nobody works for a client who has left.

Each token is one run of the net through the replica's batcher, so that streams under way are
answered together. A stream keeps the version it began with. What fails before the first token has
a status of its own; after that it is the stream's last event.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import numpy as np

from lepton.serving.batching import Batcher
from lepton.serving.following import Resident
from lepton.serving.inputs import MAX_BYTES, BadRequest
from lepton.serving.sequences import Wish, choice, scores_of, sequence_of, shown

PATIENCE_S = 60.0

Receive = Callable[[], Awaitable[Any]]


async def tokens_of(version: Resident, wish: Wish, batcher: Batcher) -> AsyncGenerator[int]:
    """Continue a sequence, token by token.

    Raises:
        Overloaded: the replica has too much to do.
        TimeoutError: the client's time is over.
        ValueError: the net gives no numbers.
    """
    outputs = version.predictor.signature.outputs
    spec = sequence_of(version.inputs, outputs)
    tokens = list(wish.prompt)
    chance = np.random.default_rng(wish.seed)
    end = asyncio.get_running_loop().time() + (wish.patience_s or PATIENCE_S * wish.max_tokens)
    for _ in range(wish.max_tokens):
        left = min(PATIENCE_S, end - asyncio.get_running_loop().time())
        if left <= 0:
            raise TimeoutError
        rows = shown(tokens, spec, outputs[0])
        found = await batcher.answer(version.run, rows, left)
        scores = scores_of(found[outputs[0].name], len(tokens))
        token = choice(scores, wish.temperature, chance)
        if token == wish.stop:
            return
        tokens.append(token)
        yield token
        await asyncio.sleep(0)  # a quick net must not keep the others' requests waiting


async def body_of(receive: Receive) -> bytes:
    """Read a request's body.

    Raises:
        BadRequest: it is too large, or its client has left.
    """
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BadRequest("the client has left", 499)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BYTES:
            raise BadRequest(f"the body has more than {MAX_BYTES} bytes", 413)
        more = message.get("more_body", False)
    return b"".join(parts)


async def until_left(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def next_of(tokens: AsyncGenerator[int], left: asyncio.Task[None]) -> int | None:
    """Return the next token, or None at the end.

    Raises:
        ConnectionError: the client left meanwhile; the net's run is not waited for.
    """
    token = asyncio.ensure_future(anext(tokens, None))
    try:
        await asyncio.wait({token, left}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not token.done():
            token.cancel()
            with suppress(asyncio.CancelledError):
                await token
    if left.done():
        raise ConnectionError("the client has left")
    return token.result()
