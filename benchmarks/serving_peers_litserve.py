"""LitServe's service for the serving benchmark; its workers want a class they can import."""

import os
from pathlib import Path
from typing import Any

import litserve as ls
import numpy as np

from benchmarks.serving_peers import net


class Digits(ls.LitAPI):
    """JSON in, JSON out; LitServe hands a predictor parsed JSON, so there is no binary form."""

    def setup(self, device: str) -> None:
        """Load the net in the worker."""
        self.answer = net(Path(os.environ["FOLDER"]))

    def decode_request(self, request):  # noqa: ANN001, ANN201 - LitServe reads the annotation
        """Return the tensor."""
        tensor = request["inputs"][0]
        return np.array(tensor["data"], np.float32).reshape(tensor["shape"])

    def predict(self, x: Any) -> Any:
        """Return the scores."""
        return self.answer(x)

    def encode_response(self, output: Any) -> Any:
        """Return plain JSON values."""
        data = output.reshape(-1).tolist()
        tensor = {"name": "output", "datatype": "FP32", "shape": list(output.shape), "data": data}
        return {"model_name": "digits", "outputs": [tensor]}


def serve(port: int) -> None:
    """Serve with one worker and the quick queue."""
    api = Digits(api_path="/digits/v2/models/digits/infer")
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False)
