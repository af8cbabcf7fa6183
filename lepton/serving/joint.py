"""Several models' applications as one: each below its own path, and what is of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from starlette.responses import JSONResponse, Response

from lepton.serving.forms import problem
from lepton.serving.grpc_server import Reply, ask

_STATES = ("draining", "failed", "ready")
"""The worst one first."""
_MERGED = ("/v2/health/ready", "/openapi.json")


def joined(apps: Mapping[str, Any]) -> Any:
    """Return an ASGI application that has these, by their models' names.

    What a request may know of a model its own application says: who may not ask it is not told of
    it, and who may ask none is refused as there.
    """
    first = next(iter(apps.values()))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        parts = path.split("/", 4)
        named = parts[3] if parts[:3] == ["", "v2", "models"] and len(parts) > 3 else ""
        if named in apps or scope["type"] != "http" or path == "/v2/health/live":
            await apps.get(named, first)(scope, receive, send)
            return
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        seen = path if path in _MERGED else "/v2"
        replies = {m: await ask(one, "GET", seen, headers) for m, one in apps.items()}
        reply = _merged(scope["method"], path, replies)
        await reply(scope, receive, send)

    return app


def _merged(method: str, path: str, replies: Mapping[str, Reply]) -> Response:
    if path == "/v2/health/ready":
        told = {m: orjson.loads(r.body) for m, r in replies.items() if r.body}
        status = max(r.status for r in replies.values())
        return JSONResponse(health_of(told), status) if told else Response(status_code=status)
    allowed = {m: r for m, r in replies.items() if r.status == 200}
    if not allowed:
        refusal = next(iter(replies.values()))
        return Response(refusal.body, refusal.status, refusal.headers)
    if method == "GET" and path == "/openapi.json":
        return JSONResponse(openapi_of({m: orjson.loads(r.body) for m, r in allowed.items()}))
    if method == "GET" and path == "/v2":
        return Response(next(iter(allowed.values())).body, media_type="application/json")
    detail = (
        f"there is no {method} {path} here, as several models are served: inference is POST "
        f"/v2/models/NAME/infer, or /v2/models/NAME/predict for plain rows, with NAME one of "
        f"{', '.join(allowed)}"
    )
    return problem(404, detail)


def health_of(told: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return how a replica of several models is, by what each of them says. Pure."""
    every = told.values()
    states = {t["state"] for t in every}
    errors = [f"{model}: {t['error']}" for model, t in told.items() if t["error"]]
    some = next(iter(every))
    return {
        "state": next(state for state in _STATES if state in states),
        "error": "; ".join(errors) or None,
        "replica": some["replica"],
        "device": some["device"],
        "waiting_rows": sum(t["waiting_rows"] for t in every),
        "answers_dropped": sum(t["answers_dropped"] for t in every),
        "models": dict(told),
    }


def openapi_of(documents: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return one OpenAPI document of several models' own ones, by their names. Pure."""
    some = next(iter(documents.values()))
    paths = {p: what for d in documents.values() for p, what in d["paths"].items()}
    versions = (f"{model} {d['info']['version']}" for model, d in documents.items())
    title = f"{', '.join(documents)}, served by lepton"
    return {
        **some,
        "info": {"title": title, "version": ", ".join(versions)},
        "paths": {path: what for path, what in paths.items() if path.startswith("/v2/models/")},
    }
