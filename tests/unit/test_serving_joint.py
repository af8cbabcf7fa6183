"""A replica of several models, asked over ASGI: what is of one of them, and what of all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from lepton.serving.access import grant
from lepton.serving.joint import health_of
from lepton.serving.service import Service
from lepton.serving.shared import SharedReplica
from tests.unit.served import body, register_model

ROWS = {"rows": [{"x": [0.0, 1.0, 2.0]}]}
LEFT, BOTH = "the token of the left one", "the token of both of them"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return register_model(tmp_path_factory.mktemp("home"), "left", "right")


class Here(SharedReplica):
    """Ended by the scene, as by Serve; not again when it is collected."""

    def __del__(self) -> None:  # type: ignore[override]
        pass


def ask(home: Path, scene: Callable[[Any, Any], Any], **settings: Any) -> None:
    async def play() -> None:
        replica = Here.__new__(Here)
        told = str(home), None, Service(**settings)
        await SharedReplica.__init__(replica, ["left", "right"], *told)
        transport = httpx.ASGITransport(replica.__serve_build_asgi_app__())
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
                await scene(http, replica)
        finally:
            await SharedReplica.__del__(replica)

    asyncio.run(play())


def test_plain_rows_are_asked_of_a_model_by_its_name(home: Path) -> None:
    async def scene(http: Any, _: Any) -> None:
        for model in ("left", "right"):
            told = (await http.post(f"/v2/models/{model}/predict", json=ROWS)).json()
            assert (told["model"], told["version"]) == (model, 1)
            by_version = await http.post(f"/v2/models/{model}/versions/1/predict", json=ROWS)
            assert by_version.json()["rows"] == told["rows"]
        for path in ("/predict", "/v2/models/other/infer"):
            nobodys = await http.post(path, json=ROWS)
            assert nobodys.status_code == 404
            assert "/v2/models/NAME/predict" in nobodys.json()["detail"]
            assert "one of left, right" in nobodys.json()["detail"]
        assert (await http.get("/v2")).json()["name"] == "lepton"
        assert (await http.get("/v2/health/live")).status_code == 200

    ask(home, scene)


def test_one_document_describes_all_models(home: Path) -> None:
    async def scene(http: Any, _: Any) -> None:
        told = (await http.get("/openapi.json")).json()
        ways = {f"/v2/models/{m}/{way}" for m in ("left", "right") for way in ("infer", "predict")}
        assert told["paths"].keys() == ways
        assert told["info"] == {
            "title": "left, right, served by lepton",
            "version": "left 1, right 1",
        }
        for way in ways:
            asked = ROWS if "predict" in way else None
            reply = await http.post(way, content=None if asked else body(), json=asked)
            assert reply.status_code == 200

    ask(home, scene)


def test_a_replica_is_ready_when_all_its_models_are(home: Path) -> None:
    async def scene(http: Any, replica: Any) -> None:
        ready = await http.get("/v2/health/ready")
        assert (ready.status_code, ready.json()["state"]) == (200, "ready")
        assert ready.json()["models"].keys() == {"left", "right"}
        right = replica._parts["right"]
        right._follower.error = "it is broken"
        failed = await http.get("/v2/health/ready")
        assert (failed.status_code, failed.json()["state"]) == (200, "failed")
        assert failed.json()["error"] == "right: it is broken"
        right._absence.away = True
        away = await http.get("/v2/health/ready")
        assert (away.status_code, away.json()["state"]) == (503, "draining")

    ask(home, scene)


def test_who_may_ask_one_model_is_told_of_that_one_alone(home: Path) -> None:
    async def scene(http: Any, _: Any) -> None:
        for path in ("/openapi.json", "/v2", "/predict"):
            refused = await http.get(path)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == 'Bearer realm="lepton"'
        bare = await http.get("/v2/health/ready")
        assert (bare.status_code, bare.content) == (200, b"")
        for token, models in ((LEFT, {"left"}), (BOTH, {"left", "right"})):
            http.headers["authorization"] = f"Bearer {token}"
            paths = (await http.get("/openapi.json")).json()["paths"]
            assert {path.split("/")[3] for path in paths} == models
            assert (await http.get("/v2/health/ready")).json()["models"].keys() == models
            assert (await http.get("/v2")).status_code == 200

    grants = (grant("l", LEFT, ["left"]), grant("b", BOTH))
    ask(home, scene, access=grants)
    ask(home, scene, access=tuple(replace(g) for g in reversed(grants)))


def test_the_health_of_several_models() -> None:
    one = {"state": "ready", "error": None, "replica": "1", "device": "cpu"}
    counted = {"waiting_rows": 2, "answers_dropped": 1}
    told = health_of({"a": one | counted, "b": one | counted | {"state": "draining"}})
    assert (told["state"], told["waiting_rows"], told["answers_dropped"]) == ("draining", 4, 2)
    assert (told["error"], told["replica"]) == (None, "1")
