"""What a caller of a running application has, against a server that fails in its ways."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lepton.errors import ServingError
from lepton.serving import tables
from lepton.serving.client import MOST_REPEATED, App
from tests.unit.served import INPUTS, listening

ROWS = {"x": np.zeros((2, 3), "float32")}
ANSWER = tables.stream_of_rows(pa.table({"output": [1.0, 2.0]}))


class Failing:
    """Answers at last.

    Args:
        times: so often it fails before.
        status: with which it fails; 0 for a cut connection.
    """

    def __init__(self, times: int, status: int) -> None:
        self.times, self.status, self.asked = times, status, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "GET":
            await JSONResponse({"inputs": INPUTS})(scope, receive, send)
            return
        self.asked += 1
        await Request(scope, receive).body()
        if self.asked > self.times:
            await Response(ANSWER)(scope, receive, send)
        elif self.status:
            await Response("oh", self.status)(scope, receive, send)
        else:
            head = [(b"content-length", b"9")]
            await send({"type": "http.response.start", "status": 200, "headers": head})
            raise RuntimeError("killed")


@pytest.mark.parametrize("status", [0, 502])
def test_a_request_whose_replica_was_killed_is_sent_again(status: int) -> None:
    app = Failing(MOST_REPEATED, status)
    with listening(app) as url:
        assert App("m", url).predict(ROWS)["output"].tolist() == [1.0, 2.0]
    assert app.asked == MOST_REPEATED + 1


@pytest.mark.parametrize(
    ("status", "asked", "words"),
    [(0, MOST_REPEATED + 1, "gives no answer"), (502, MOST_REPEATED + 1, "502"), (503, 1, "503")],
)
def test_it_is_not_sent_for_ever_nor_where_it_was_answered(
    status: int, asked: int, words: str
) -> None:
    app = Failing(9, status)
    with listening(app) as url, pytest.raises(ServingError, match=words):
        App("m", url).predict(ROWS)
    assert app.asked == asked
