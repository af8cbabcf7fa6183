"""The forms a request and its answer may have over HTTP: JSON, raw tensors or an Arrow stream.

The form of a request is told by its headers, the form of the answer by the request. A body is
refused as soon as it is known to be too large, before it is read or unpacked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from lepton.serving import problems, tables
from lepton.serving.arrays import Arrays
from lepton.serving.binary import unpacked
from lepton.serving.inputs import MAX_BYTES, BadRequest, Input
from lepton.serving.plain import inquiry_of_rows, reply_of_rows
from lepton.serving.protocol import Inquiry, inquiry_of, patience_of, reply_of

LENGTH = "inference-header-content-length"


async def inquiry_in(
    request: Request, inputs: Sequence[Input], outputs: Sequence[str], *, plain: bool = False
) -> Inquiry:
    """Read a request.

    Args:
        request: as it came.
        inputs: what the model takes.
        outputs: what it gives.
        plain: it is JSON rows.

    Raises:
        BadRequest: what the client got wrong, with its HTTP status.
    """
    body = unpacked(await _body(request), request.headers.get("content-encoding", ""))
    if plain:
        found = inquiry_of_rows(body, inputs)
    elif _is_stream(request.headers.get("content-type", "")):
        identity = request.headers.get("x-request-id", "")[:256]
        rows = tables.rows_of_stream(body, inputs)
        found = Inquiry(rows=rows, identity=identity, wanted={}, size=len(body))
    else:
        found = inquiry_of(body, inputs, outputs, request.headers.get(LENGTH))
    patience_s = patience_of(request.headers, found.patience_s)
    return found if patience_s == found.patience_s else replace(found, patience_s=patience_s)


def reply_to(
    request: Request,
    inquiry: Inquiry | Arrays,
    version: tuple[str, int],
    identity: str,
    outputs: Mapping[str, np.ndarray[Any, Any]],
) -> Response:
    """Return the answer in the form that was asked for.

    Args:
        request: its Accept header and content type decide for an Arrow stream.
        inquiry: which outputs, and which of them raw.
        version: the model's name and version.
        identity: of the request.
        outputs: all of them, of shape (rows, …).
    """
    if _wants_stream(request):
        chosen = {name: outputs[name] for name in inquiry.wanted or outputs}
        content = tables.stream_of(*version, identity, chosen)
        return Response(content, media_type=tables.MEDIA_TYPE)
    if inquiry.plain:
        content = reply_of_rows(*version, identity, outputs)
        return Response(content, media_type="application/json")
    content, length = reply_of(*version, identity, outputs, inquiry)
    if length is None:
        return Response(content, media_type="application/json")
    return Response(content, media_type="application/octet-stream", headers={LENGTH: str(length)})


def problem(status: int, detail: str, **members: Any) -> Response:
    """Return an answer that says what went wrong."""
    content = problems.problem_of(status, detail, **members)
    return Response(content, status_code=status, media_type=problems.MEDIA_TYPE)


async def _body(request: Request) -> bytes:
    told = request.headers.get("content-length", "0")
    size = int(told) if told.isascii() and told.isdigit() else 0
    parts: list[bytes] = []
    if size <= MAX_BYTES:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > MAX_BYTES:
                break
            parts.append(part)
    if size > MAX_BYTES:
        raise BadRequest(f"the body has more than {MAX_BYTES} bytes: send fewer rows at once", 413)
    return b"".join(parts)


def _is_stream(header: str) -> bool:
    return header.split(";")[0].strip().lower() == tables.MEDIA_TYPE


def _wants_stream(request: Request) -> bool:
    if not any("arrow" in request.headers.get(name, "") for name in ("accept", "content-type")):
        return False
    accepted = [a.split(";")[0].strip() for a in request.headers.get("accept", "").split(",")]
    if tables.MEDIA_TYPE in accepted:
        return True
    return _is_stream(request.headers.get("content-type", "")) and (
        "application/json" not in accepted
    )
