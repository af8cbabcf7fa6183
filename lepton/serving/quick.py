"""The requests that most clients send most of the time, answered without a detour.

What is answered here is answered as :meth:`lepton.serving.replica.Replica.infer` would; whatever
needs a second look (another form, a canary, a slow model, anything wrong) is left to that.
"""

from __future__ import annotations

import os
import random
import time

from lepton.serving.absence import Absence
from lepton.serving.arrays import arrays_in
from lepton.serving.batching import Batcher
from lepton.serving.following import Follower
from lepton.serving.forms import LENGTH
from lepton.serving.outcome import Keeper, Outcome, baggage_of
from lepton.serving.protocol import PATIENCE, is_patience, reply_of
from lepton.serving.shortcut import Reply
from lepton.serving.together import Together

_LENGTH, _PATIENCE = LENGTH.encode(), PATIENCE.encode()
_JSON, _RAW = b"application/json", b"application/octet-stream"


class Quick:
    """Answers a model's requests at once.

    Args:
        model: the registered name.
        follower: knows who answers.
        batcher: knows who is quick.
        keeper: takes spans and rows.
        absence: knows whether anybody is answered now.
    """

    def __init__(
        self, model: str, follower: Follower, batcher: Batcher, keeper: Keeper, absence: Absence
    ) -> None:
        self._model = model
        self._follower = follower
        self._batcher = batcher
        self._together = Together(batcher.is_quick, batcher.at_once)
        self._keeper = keeper
        self._absence = absence
        self._replica = str(os.getpid()).encode()
        self._path = f"/{model}/v2/models/{model}/infer"
        self._answered = 0

    @property
    def waiting(self) -> bool:
        """Whether anybody is about to be answered."""
        return self._together.waiting

    def answered(self) -> int:
        """Return how many requests were answered since this was asked last."""
        answered, self._answered = self._answered, 0
        return answered

    async def reply(self, headers: dict[bytes, bytes], body: bytes) -> Reply | None:
        """Answer a request for the champion, or leave it to others."""
        began_ns = time.time_ns()
        now = self._follower.now
        version = now.champion
        alone = now.canary is None and now.shadow is None and not self._absence.away
        if not alone or not version.as_arrays or not self._batcher.is_quick(version.run):
            return None
        if not _is_plain(headers):
            return None
        inquiry = arrays_in(body, headers.get(_LENGTH), version.inputs)
        if inquiry is None:
            return None
        outputs = await self._together.outputs(version.run, inquiry)
        if outputs is None:
            return None
        identity = inquiry.identity or f"{random.getrandbits(128):032x}"
        content, length = reply_of(self._model, version.version, identity, outputs, inquiry)
        came = Outcome(
            version, "champion", began_ns, inquiry=inquiry, outputs=outputs, call=self._path
        )
        span = self._keeper.span(headers, came)
        self._keeper.row(came, identity, span)
        self._answered += 1
        told = [
            (b"content-type", _JSON if length is None else _RAW),
            (b"content-length", str(len(content)).encode()),
            (b"traceparent", span.encode()),
            (b"baggage", baggage_of(headers.get(b"baggage"), version).encode()),
            (b"x-lepton-version", str(version.version).encode()),
            (b"x-lepton-replica", self._replica),
        ]
        given = headers.get(b"x-request-id")
        named = given.decode("latin-1") if given else identity
        if named.isascii() and named.isprintable():  # else no header can hold it; the body does
            told.append((b"x-request-id", named.encode()))
        if length is not None:
            told.append((_LENGTH, str(length).encode()))
        return told, content


def _is_plain(headers: dict[bytes, bytes]) -> bool:
    """Whether headers ask for nothing in particular, but to be quick."""
    if b"content-encoding" in headers or b"arrow" in headers.get(b"accept", b""):
        return False
    told = headers.get(_PATIENCE)
    return told is None or is_patience(told)
