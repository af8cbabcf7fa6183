"""What a client is told when its request fails: RFC 9457 problem details. Pure.

The member ``error`` repeats the detail, for clients of the Open Inference Protocol, which look
for it there.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import orjson

MEDIA_TYPE = "application/problem+json"


def problem_of(status: int, detail: str, **members: Any) -> bytes:
    """Return the body of an answer with that status.

    Args:
        status: from 400 to 599.
        detail: what was wrong with this request and what to do.
        members: more of it, as RFC 9457 allows.
    """
    body = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "error": detail,
        **members,
    }
    return orjson.dumps(body)
