"""The servers of the serving benchmark, one process each: the same program behind each of them.

``python -m benchmarks.serving_peers NAME FOLDER PORT`` serves until it is terminated. Each peer is
written as its own documentation writes a fast service: bodies parsed by orjson, no validation
beyond the tensor's shape, no log, no trace. Run with an interpreter that has the peer.
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import orjson

PIXELS = 64


def net(folder: Path) -> Any:
    """Return a function from an array of shape (n, 64) to scores of shape (n, 10)."""
    import torch

    torch.set_num_threads(1)
    state = torch.load(folder / "mlp.pt", weights_only=True)
    model = torch.nn.Sequential(
        torch.nn.Linear(PIXELS, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
    )
    model.load_state_dict(state)
    model.eval()

    def answer(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(pixels)).numpy()

    return answer


def pixels_of(body: bytes, length: str | None) -> np.ndarray:
    """Return the request's tensor: JSON, or raw bytes after ``length`` bytes of JSON."""
    if length is not None:
        return np.frombuffer(bytearray(body[int(length) :]), np.float32).reshape(-1, PIXELS)
    tensor = orjson.loads(body)["inputs"][0]
    return np.array(tensor["data"], np.float32).reshape(tensor["shape"])


def reply_of(scores: np.ndarray) -> bytes:
    """Return the answer in the protocol's JSON."""
    output = {
        "name": "output",
        "datatype": "FP32",
        "shape": list(scores.shape),
        "data": scores.reshape(-1),
    }
    return orjson.dumps(
        {"model_name": "digits", "outputs": [output]}, option=orjson.OPT_SERIALIZE_NUMPY
    )


def fastapi(folder: Path, port: int) -> None:
    """Plain FastAPI on uvicorn."""
    import uvicorn
    from fastapi import FastAPI, Request, Response

    app, answer = FastAPI(), net(folder)

    @app.post("/digits/v2/models/digits/infer")
    async def infer(request: Request) -> Response:
        length = request.headers.get("inference-header-content-length")
        pixels = pixels_of(await request.body(), length)
        return Response(reply_of(answer(pixels)), media_type="application/json")

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


def ray_serve(folder: Path, port: int) -> None:
    """Ray Serve as it comes: FastAPI in a deployment, the default proxy."""
    import time

    import ray
    from fastapi import FastAPI, Request, Response
    from ray import serve  # noqa: TID251 - a peer

    app = FastAPI()

    @serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": 0.5})
    @serve.ingress(app)
    class Digits:
        def __init__(self) -> None:
            self.answer = net(folder)

        @app.post("/v2/models/digits/infer")
        async def infer(self, request: Request) -> Response:
            length = request.headers.get("inference-header-content-length")
            pixels = pixels_of(await request.body(), length)
            return Response(reply_of(self.answer(pixels)), media_type="application/json")

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=2**28,
        logging_level="error",
    )
    serve.start(
        http_options={"host": "127.0.0.1", "port": port},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    serve.run(Digits.bind(), route_prefix="/digits")
    while True:
        time.sleep(3600)


def lepton(folder: Path, port: int) -> None:
    """lepton: checks, trace, inference log, everything on."""
    import time

    from lepton import cluster
    from lepton.registry import Registry
    from lepton.serving.app import start

    registry = Registry(f"{folder}/registry")
    pointer = registry.state("digits").pointer
    if pointer.champion is None:
        registry.promote("digits", 1, expect=pointer.seq, gate=[], trace_id="")
    cluster.connect(object_store_memory=2**28)
    start("digits", str(folder), port=port)
    while True:
        time.sleep(3600)


def litserve(folder: Path, port: int) -> None:
    """LitServe: one worker, its quick queue, no batches."""
    from benchmarks.serving_peers_litserve import serve

    os.environ["FOLDER"] = str(folder)
    serve(port)


def bentoml(folder: Path, port: int) -> None:
    """BentoML: its server in front of the plain handler."""
    os.environ["FOLDER"] = str(folder)
    where = ["--host", "127.0.0.1", "--port", str(port)]
    command = Path(sys.executable).parent / "bentoml"
    service = "benchmarks.serving_peers_bento:Digits"
    os.execv(command, [str(command), "serve", service, *where])


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
