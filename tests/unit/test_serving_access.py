"""Bearer tokens: who is refused with what, and what of a token is kept."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from lepton.errors import ServingError
from lepton.serving import Grant, Service, grant
from lepton.serving.access import VARIABLE, Access, grants_in, guarded, refuse_strangers
from lepton.serving.service import service_of

TOKEN, OTHER = "tell-it-to-nobody", "tell-it-to-nobody-else"
GRANTS = (grant("me", TOKEN), grant("you", OTHER, ["n", "o"]))


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (f"Bearer {TOKEN}", None),
        (f"bearer  {TOKEN} ", None),
        (None, 401),
        ("", 401),
        (TOKEN, 401),
        (f"Basic {TOKEN}", 401),
        ("Bearer ", 401),
        (f"Bearer {TOKEN[:-1]}", 401),
        (f"Bearer {TOKEN}x", 401),
        (f"Bearer {OTHER}", 403),
    ],
)
def test_only_a_known_token_for_this_model_passes(header: str | None, status: int | None) -> None:
    refusal = Access(GRANTS, "m").refusal(header.encode() if header is not None else None)
    assert (refusal and refusal[0]) == status
    if refusal:
        assert TOKEN not in refusal[1]


def test_a_token_is_for_its_models_only() -> None:
    header = f"Bearer {OTHER}".encode()
    assert Access(GRANTS, "o").refusal(header) is None
    assert Access(GRANTS, "m").refusal(header) == (
        403,
        "this token may not ask model 'm': use one that may",
    )


def test_the_token_itself_is_not_kept() -> None:
    service = Service(access=GRANTS)
    for whole in (repr(service), repr(GRANTS), pickle.dumps(service).decode("latin-1")):
        assert TOKEN not in whole
    assert GRANTS[0].sha256 not in repr(service)


def test_weak_or_wrong_tokens_are_refused_without_repeating_them() -> None:
    for token in ("short", "ä" * 20, "new\nline" * 4):
        with pytest.raises(ValueError, match="at least 16 printable") as raised:
            grant("me", token)
        assert token not in str(raised.value)
    with pytest.raises(ValueError, match="by its SHA-256"):
        Grant(name="me", sha256=TOKEN)


def test_tokens_come_from_the_environment() -> None:
    assert grants_in({}) is None
    assert grants_in({VARIABLE: f"me={TOKEN}, x={OTHER}="}) == (
        grant("me", TOKEN),
        grant("x", f"{OTHER}="),
    )
    for wrong in ("", TOKEN, f"={TOKEN}", f"me={TOKEN},"):
        with pytest.raises(ValueError, match=r"must be NAME=TOKEN") as raised:
            grants_in({VARIABLE: wrong})
        assert TOKEN not in str(raised.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3", "::"])
def test_nothing_is_served_to_other_machines_by_mistake(host: str) -> None:
    with pytest.raises(ServingError, match=f"Serve listens on {host}, which other machines"):
        refuse_strangers(host, None, {})
    refuse_strangers(host, (), {})
    refuse_strangers(host, GRANTS, {})
    refuse_strangers(host, None, {VARIABLE: f"me={TOKEN}"})
    for here in (None, "127.0.0.1", "::1", "localhost"):
        refuse_strangers(here, None, {})


def test_settings_may_come_from_a_file() -> None:
    told = {"name": "me", "sha256": GRANTS[0].sha256, "models": ("m",)}
    assert service_of({"access": [told]}) == Service(access=(grant("me", TOKEN, ["m"]),))
    assert service_of(None) == Service()


async def answered(_: Any) -> JSONResponse:
    return JSONResponse({"error": "a secret path"})


@pytest.mark.parametrize("root", ["", "/m"])
def test_the_application_is_closed_but_for_probes(root: str) -> None:
    paths = ("/v2/health/ready", "/v2/health/live", "/v2", "/v2/models/m/infer")
    inner = Starlette(routes=[Route(p, answered, methods=["GET", "POST"]) for p in paths])
    app = guarded(inner, Access(GRANTS, "m"))
    whole = Starlette(routes=[Mount(root, app)]) if root else app

    async def scene() -> None:
        transport = httpx.ASGITransport(whole)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
            ready = await http.get(f"{root}/v2/health/ready")
            assert (ready.status_code, ready.content) == (200, b"")
            closed = await http.post(f"{root}/v2/models/m/infer")
            assert closed.status_code == 401
            assert closed.headers["content-type"] == "application/problem+json"
            assert closed.json()["status"] == 401
            assert closed.headers["www-authenticate"] == 'Bearer realm="lepton"'
            mine = {"authorization": f"Bearer {TOKEN}"}
            for path in paths:
                assert (await http.get(f"{root}{path}", headers=mine)).json()
            yours = {"authorization": f"Bearer {OTHER}"}
            assert (await http.get(f"{root}/v2", headers=yours)).status_code == 403

    asyncio.run(scene())
