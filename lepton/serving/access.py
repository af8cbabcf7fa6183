"""Who may ask: bearer tokens, known by their hashes alone. Pure, but for the ASGI layer at the end.

A token is compared in constant time and never kept, printed or logged; what is passed to replicas
is its SHA-256, which is safe for tokens that are random and long (make one with
``python -c "import secrets; print(secrets.token_urlsafe(32))"``).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lepton.errors import ServingError
from lepton.serving.forms import problem

VARIABLE = "LEPTON_SERVE_TOKENS"
FEWEST_CHARACTERS = 16
LOOPBACK = ("127.0.0.1", "::1", "localhost")
OPEN_PATHS = ("/v2/health/live", "/v2/health/ready")
"""Probes have no tokens: of a ready replica they learn the status and nothing else."""

_UNKNOWN = (
    "a bearer token is needed: send 'Authorization: Bearer TOKEN' with one that is known here"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """A token that may ask some models.

    Attributes:
        name: whose it is, for people.
        sha256: of the token, hexadecimal.
        models: that it may ask; none means all.
    """

    name: str
    sha256: str = field(repr=False)
    models: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or not set(self.sha256) <= set("0123456789abcdef"):
            raise ValueError(f"the token of {self.name!r} must be given by its SHA-256, in hex")


def grant(name: str, token: str, models: Sequence[str] = ()) -> Grant:
    """Return what is kept of a token.

    Raises:
        ValueError: it is too short to be safe, or cannot be sent.
    """
    if len(token) < FEWEST_CHARACTERS or not token.isascii() or not token.isprintable():
        raise ValueError(
            f"the token of {name!r} must have at least {FEWEST_CHARACTERS} printable ASCII "
            "characters: make one with secrets.token_urlsafe(32)"
        )
    digest = hashlib.sha256(token.encode()).hexdigest()
    return Grant(name=name, sha256=digest, models=tuple(models))


def grants_in(environment: Mapping[str, str]) -> tuple[Grant, ...] | None:
    """Return the grants of :data:`VARIABLE`, ``name=token,name=token``; None where it is not set.

    Raises:
        ValueError: it is not like that; the message does not repeat it.
    """
    told = environment.get(VARIABLE)
    if told is None:
        return None
    found: list[Grant] = []
    for at, part in enumerate(told.split(","), start=1):
        name, equals, token = part.strip().partition("=")
        if not name or not equals:
            raise ValueError(f"entry {at} of {VARIABLE} must be NAME=TOKEN")
        found.append(grant(name, token.strip()))
    return tuple(found)


def refuse_strangers(host: str | None, grants: object, environment: Mapping[str, str]) -> None:
    """See to it that nothing is served to other machines by mistake.

    Args:
        host: that the ingress listens on; None is loopback.
        grants: who may ask, or a file that says so; None where nothing was said, empty for
            everybody.
        environment: may have tokens.

    Raises:
        ServingError: other machines can reach it, and nobody said who may ask.
    """
    if grants is None and VARIABLE not in environment and (host or LOOPBACK[0]) not in LOOPBACK:
        raise ServingError(
            f"Serve listens on {host}, which other machines can reach, and there are no tokens: "
            f"set {VARIABLE}, or say Service(access=()) to let everybody ask"
        )


class Access:
    """Checks the header of each request.

    Args:
        grants: who may ask.
        model: which they ask here.
    """

    def __init__(self, grants: Sequence[Grant], model: str) -> None:
        self._model = model
        self._known: list[tuple[bytes, bool]] = []
        self.know(grants)

    def know(self, grants: Sequence[Grant]) -> None:
        """Have these and no others ask from now on."""
        self._known = [
            (bytes.fromhex(g.sha256), not g.models or self._model in g.models) for g in grants
        ]

    def refusal(self, header: bytes | None) -> tuple[int, str] | None:
        """Return why a request with that Authorization header is refused, or None.

        Returns:
            The HTTP status, 401 or 403, and the detail.
        """
        if header is None or header[:7].lower() != b"bearer ":
            return 401, _UNKNOWN
        digest = hashlib.sha256(header[7:].strip()).digest()
        known = allowed = False
        for wanted, here in self._known:  # all of them, so that the time tells nothing
            same = hmac.compare_digest(digest, wanted)
            known |= same
            allowed |= same and here
        if allowed:
            return None
        if known:
            return 403, f"this token may not ask model {self._model!r}: use one that may"
        return 401, _UNKNOWN


def guarded(app: Any, access: Access) -> Any:
    """Return an ASGI application that answers only to those who may ask."""

    async def guard(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        header = next((v for k, v in scope["headers"] if k == b"authorization"), None)
        refusal = access.refusal(header)
        if refusal is None:
            await app(scope, receive, send)
        elif scope["path"].removeprefix(scope.get("root_path", "")) in OPEN_PATHS:
            await app(scope, receive, _without_body(send))
        else:
            reply = problem(*refusal)
            reply.headers["www-authenticate"] = 'Bearer realm="lepton"'
            await reply(scope, receive, send)

    return guard


def _without_body(send: Any) -> Any:
    async def bare(message: Any) -> None:
        if message["type"] == "http.response.start":
            headers = [(b"content-length", b"0")]
            await send({**message, "headers": headers})
        else:
            await send({**message, "body": b""})

    return bare
