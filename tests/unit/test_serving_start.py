"""Ray Serve's first start, where its proxy does not come up at once."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError

from lepton.errors import ServingError
from lepton.serving import Service, app, running
from lepton.serving.running import Seen


@pytest.fixture(params=[ActorDiedError(), TimeoutError(), GetTimeoutError()])
def failing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(**_: object) -> None:
        raise request.param

    monkeypatch.setattr(app.serve, "start", start)
    monkeypatch.setattr(running, "client", lambda: None)
    monkeypatch.setattr(app, "_tell_what_is_slow", lambda _: None)
    monkeypatch.setattr(app, "LOOK_S", 0)
    monkeypatch.setattr(app, "WAIT_S", 0.1)


def _goes_through(states: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have a proxy go through these states, a look each; return those that are still to come."""
    left = list(states)

    def status() -> Seen:
        return Seen({}, {"node": left.pop(0) if len(left) > 1 else left[0]})

    monkeypatch.setattr(running, "status", status)
    return left


@pytest.mark.usefixtures("failing")
def test_a_proxy_that_does_not_come_up_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = _goes_through(["UNHEALTHY", "STARTING", "HEALTHY", "later"], monkeypatch)
    with caplog.at_level("WARNING", "lepton"):
        app._start_serve(Service(), 1)
    assert left == ["later"]
    assert "did not come up" in caplog.text


@pytest.mark.usefixtures("failing")
def test_if_no_proxy_comes_up_it_is_said_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    _goes_through(["UNHEALTHY"], monkeypatch)
    with pytest.raises(ServingError, match="serve shutdown"):
        app._start_serve(Service(), 1)
