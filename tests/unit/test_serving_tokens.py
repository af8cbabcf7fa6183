"""Tokens that change while requests come, asked over a socket as anybody would."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.responses import PlainTextResponse

from lepton import cluster
from lepton.errors import ServingError
from lepton.serving import Service, grant
from lepton.serving.access import guarded
from lepton.serving.app import _with_tokens
from lepton.serving.deployed import access_for
from lepton.serving.tokens import VARIABLE, FileAccess, grants_of

OLD, NEW = "the-old-token-of-mine", "the-new-token-of-mine"


@contextmanager
def listening(app: Any) -> Iterator[str]:
    port = cluster.free_ports(1)[0]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        end = time.monotonic() + 60
        while not server.started and time.monotonic() < end:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join(60)


def replaced(path: Path, text: str) -> None:
    """As careful people do it: never is half a file there."""
    beside = path.with_suffix(".next")
    beside.write_text(text)
    beside.replace(path)


def test_a_token_is_exchanged_without_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"me={OLD}\n")
    app = guarded(PlainTextResponse("here"), FileAccess(str(path), "m", look_s=0))

    with listening(app) as url, httpx.Client() as http:

        def status(token: str) -> int:
            return http.get(url, headers={"authorization": f"Bearer {token}"}).status_code

        assert (status(OLD), status(NEW)) == (200, 401)
        replaced(path, f"# both, for a while\nme={OLD}\nme={NEW}  # the next one\n")
        assert (status(OLD), status(NEW)) == (200, 200)
        replaced(path, f"me=sha256:{hashlib.sha256(NEW.encode()).hexdigest()}")
        assert (status(OLD), status(NEW)) == (401, 200)
        replaced(path, f"me={NEW} other,another")
        assert status(NEW) == 403
        replaced(path, f"me={NEW} m")
        assert status(NEW) == 200

        with caplog.at_level(logging.WARNING, "lepton"):
            for wrong in ("", "no line of it", "me=short"):
                replaced(path, wrong)
                assert [status(NEW) for _ in range(3)] == [200] * 3
            path.unlink()
            assert status(NEW) == 200
        assert len(caplog.records) == 4  # each said once
        assert NEW not in caplog.text
        path.write_text(f"me={OLD}")
        assert (status(OLD), status(NEW)) == (200, 401)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "lists no token"),
        ("# me=nobody-at-all-may", "lists no token"),
        (NEW, "line 1 of F must be NAME=TOKEN"),
        (f"={NEW}", "line 1 of F must be"),
        (f"\nme={NEW} m n", "line 2 of F must be"),
        (f"me={NEW} ,", "names no model"),
        ("me=short", "line 1 of F: .*at least 16"),
        ("me=sha256:12", "line 1 of F: .*SHA-256"),
    ],
)
def test_a_wrong_file_is_told_without_its_tokens(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        grants_of(text, "F")
    assert NEW not in str(raised.value)


def test_settings_say_where_tokens_are(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"me={OLD} m")
    told = Service(tokens_file=str(path))
    assert _with_tokens(Service(), {VARIABLE: str(path)}) == told
    assert _with_tokens(told, {}) == told
    assert _with_tokens(Service(access=()), {VARIABLE: str(path)}) == Service(access=())
    found = access_for(told, "m")
    assert found is not None
    assert found.refusal(f"Bearer {OLD}".encode()) is None
    assert access_for(Service(), "m") is None

    path.write_text("")
    with pytest.raises(ValueError, match="lists no token"):
        _with_tokens(told, {})
    with pytest.raises(ServingError, match="model 'm' is not served"):
        access_for(told, "m")
    with pytest.raises(ServingError, match="cannot read the tokens in"):
        access_for(Service(tokens_file=str(tmp_path / "none")), "m")
    with pytest.raises(ValueError, match="both say who may ask"):
        Service(access=(grant("me", OLD),), tokens_file=str(path))
