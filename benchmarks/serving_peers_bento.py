"""BentoML's service for the serving benchmark; ``bentoml serve`` wants a module of its own."""

import os
from pathlib import Path

import bentoml
from fastapi import FastAPI, Request, Response

from benchmarks.serving_peers import net, pixels_of, reply_of

app = FastAPI()


@bentoml.service(workers=1, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
@bentoml.asgi_app(app, path="/digits")
class Digits:
    """The same handler as plain FastAPI's, mounted into BentoML's server: its fast way."""

    def __init__(self) -> None:
        answer = net(Path(os.environ["FOLDER"]))

        @app.post("/v2/models/digits/infer")
        async def infer(request: Request) -> Response:
            length = request.headers.get("inference-header-content-length")
            pixels = pixels_of(await request.body(), length)
            return Response(reply_of(answer(pixels)), media_type="application/json")
