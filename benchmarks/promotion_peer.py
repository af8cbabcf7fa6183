"""A plain Ray Serve deployment that knows its version: what serve.run changes in one step."""

from pathlib import Path

from fastapi import FastAPI, Request, Response
from ray import serve  # noqa: TID251 - a peer

from benchmarks.serving_peers import net, pixels_of, reply_of

api = FastAPI()


@serve.deployment(ray_actor_options={"num_cpus": 0.5})
@serve.ingress(api)
class Digits:
    """Answers and says by which version."""

    def __init__(self, folder: str, version: str) -> None:
        self.answer, self.version = net(Path(folder)), version

    @api.post("/infer")
    async def infer(self, request: Request) -> Response:
        """Answer a request."""
        pixels = pixels_of(await request.body(), None)
        headers = {"x-lepton-version": self.version}
        return Response(reply_of(self.answer(pixels)), headers=headers)


def run(folder: Path, version: str) -> object:
    """Serve that version."""
    return serve.run(Digits.bind(str(folder), version), name="plain", route_prefix="/plain")
