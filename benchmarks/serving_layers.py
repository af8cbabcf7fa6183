"""Where a request's time goes in the replica: each layer called alone, in microseconds."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from benchmarks import claims, serving_model
from lepton.registry import Registry
from lepton.serving.arrays import arrays_in
from lepton.serving.batching import Batcher
from lepton.serving.protocol import inquiry_of, reply_of
from lepton.serving.replica import Replica
from lepton.serving.together import Together
from lepton.telemetry import Carrier, Spool

CALLS, ROUNDS = 500, 7


def best(call: Callable[[], Any]) -> float:
    """Return microseconds a call takes, in the quietest of several rounds."""
    call()
    found: list[float] = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        found.append((time.perf_counter() - began) / CALLS * 1e6)
    return min(found)


def awaited(call: Callable[[], Awaitable[Any]], loop: asyncio.AbstractEventLoop) -> float:
    """Return as :func:`best` what a coroutine takes."""

    async def many() -> float:
        began = time.perf_counter()
        for _ in range(CALLS):
            await call()
        return (time.perf_counter() - began) / CALLS * 1e6

    return min(loop.run_until_complete(many()) for _ in range(ROUNDS))


def measure(folder: Path) -> list[claims.Claim]:
    """Return what each layer of one-row JSON requests costs."""
    registry = Registry(f"{folder}/registry")
    pointer = registry.state(serving_model.MODEL).pointer
    if pointer.champion is None:
        registry.promote(serving_model.MODEL, 1, expect=pointer.seq, gate=[], trace_id="")
    replica = Replica(serving_model.MODEL, str(folder))
    version = replica._follower.now.champion
    body = serving_model.bodies(folder)["1 row, JSON"][0]
    inquiry = arrays_in(body, None, version.inputs)
    assert inquiry is not None
    outputs = version.run(inquiry)
    spool, batcher = Spool(str(folder / "spans")), Batcher()
    loop = asyncio.new_event_loop()

    def spanned() -> None:
        spool.add("lepton.request", Carrier(), time.time_ns(), kind="server", links=["x"])

    def span_kept() -> None:
        spanned()
        if len(spool._waiting) >= CALLS:
            spool.flush()

    together = Together(batcher.is_quick, batcher.at_once)

    def in_a_turn(many: int) -> float:
        async def turn() -> None:
            await asyncio.gather(*(together.outputs(version.run, inquiry) for _ in range(many)))

        return awaited(turn, loop) / many

    for each in (batcher, replica._batcher):  # until they know that it is quick
        while not each.is_quick(version.run):
            loop.run_until_complete(each.answer(version.run, inquiry.table()))
    headers = {b"host": b"here", b"content-type": b"application/json"}
    model = best(lambda: version.run(inquiry))
    found = {
        "signature: read and checked": best(lambda: arrays_in(body, None, version.inputs)),
        "signature: the careful way": best(
            lambda: inquiry_of(body, version.inputs, version.outputs)
        ),
        "model: one row": model,
        "batching: beside the model": awaited(lambda: together.outputs(version.run, inquiry), loop)
        - model,
        "model and batching: each of 4 of one turn": in_a_turn(4),
        "answer written": best(lambda: reply_of("digits", 1, "x", outputs, inquiry)),
        "tracing: in the request": best(spanned),
        "tracing: with writing": best(span_kept),
        "log: a row of a commit of many": logged(inquiry, outputs),
        "whole replica, at once": awaited(lambda: replica.at_once(headers, body), loop),
        "whole replica, the careful way over ASGI": asked(replica, body, loop),
    }
    spool.close()
    batcher.close()
    replica.__del__()
    return [claims.claim(f"layer: {k}", v, None, "us", runs=ROUNDS) for k, v in found.items()]


def logged(rows: Any, outputs: Any) -> float:
    """Return the log's cost a request when a second's worth goes into one table."""
    from lepton.serving.answers import Answer, AnswerLog, _table

    def answer() -> Answer:
        return Answer(
            request_id="x",
            time_us=1,
            version=1,
            variant="champion",
            status=200,
            trace_id="t",
            latency_ms=1.0,
            rows=rows,
            outputs=outputs,
        )

    def kept() -> None:
        log = AnswerLog("", "digits")
        for _ in range(1000):
            log.add(answer())
        taken, log._waiting = log._waiting, deque()
        log.close()
        _table(taken, "digits")

    return min(_once(kept) for _ in range(ROUNDS)) / 1000


def _once(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e6


def asked(replica: Replica, body: bytes, loop: asyncio.AbstractEventLoop) -> float:
    """Return what a whole request costs, without a network."""
    app = replica.__serve_build_asgi_app__()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": "/v2/models/digits/infer",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": headers,
        "server": ("here", 80),
        "client": ("me", 1),
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        assert message.get("status", 200) == 200, message

    return awaited(lambda: app(dict(scope), receive, send), loop)
