"""Promoting where nothing is served yet, and what is left of an application when that fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.schema import ApplicationStatus

from lepton import cluster
from lepton.errors import RegistryError, ServingError
from lepton.promotion import promote
from lepton.registry import Registry
from lepton.serving import App, Service, app, client, running, start

promoting = import_module("lepton.promotion.promote")  # the package has the function by that name


@dataclass
class Cluster:
    """What Ray Serve would know, and what it was asked to do."""

    status: str = ""
    replicas: dict[str, int] = field(default_factory=dict[str, int])
    fails: bool = False
    http_config: Any = field(default_factory=lambda: SimpleNamespace(host="", port=1))
    done: list[str] = field(default_factory=list[str])

    def get_serve_details(self) -> dict[str, Any]:
        """Return what the controller tells, as far as it is looked at."""
        if not self.status:
            return {"applications": {}, "proxies": {}}
        replicas = [{"state": state} for state, n in self.replicas.items() for _ in range(n)]
        deployment = {"replicas": replicas, "message": "why it is so"}
        told = {"status": ApplicationStatus(self.status), "deployments": {"replica": deployment}}
        return {"applications": {"lepton-m": told}, "proxies": {}}

    def run(self, *_: object, **__: object) -> None:
        self.done.append("run")
        if self.fails:
            self.status, self.replicas = "DEPLOY_FAILED", self.replicas or {}
            raise RuntimeError("deploying failed")
        self.status, self.replicas = "RUNNING", {"RUNNING": 1}

    def delete(self, name: str) -> None:
        self.done.append(f"delete {name}")
        self.status = ""


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster()
    for name in ("run", "delete"):
        monkeypatch.setattr(app.serve, name, getattr(made, name))
    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(app, "_start_serve", lambda *_: None)
    monkeypatch.setattr(app, "_refuse_strangers", lambda *_: None)
    monkeypatch.setattr(running, "client", lambda: made)
    monkeypatch.setattr(app, "build", lambda args: args)
    monkeypatch.setattr(app, "WAIT_S", 0.3)
    return made


@pytest.mark.parametrize(
    ("status", "replicas"),
    [
        ("RUNNING", {"RUNNING": 1}),
        ("RUNNING", {}),  # asleep
        ("DEPLOY_FAILED", {"RUNNING": 1}),  # an upgrade failed: the former replicas serve on
        ("UNHEALTHY", {"RUNNING": 1, "STARTING": 1}),
        ("DEPLOYING", {"RUNNING": 2, "STARTING": 1}),  # an upgrade is under way
    ],
)
def test_what_runs_is_never_deployed_again_unless_asked(
    serve: Cluster, status: str, replicas: dict[str, int]
) -> None:
    serve.status, serve.replicas = status, replicas
    assert start("m", "home").application == "lepton-m"
    assert serve.done == []
    start("m", "home", upgrade=True)
    assert serve.done == ["run"]


def test_a_failed_upgrade_leaves_the_former_replicas(serve: Cluster) -> None:
    serve.status, serve.replicas, serve.fails = "UNHEALTHY", {"RUNNING": 1}, True
    with pytest.raises(ServingError, match="was not upgraded, its former replicas serve on: why"):
        start("m", "home", upgrade=True)
    assert serve.done == ["run"]


@pytest.mark.parametrize(("before", "deleted"), [("", True), ("DEPLOY_FAILED", False)])
def test_what_did_not_start_is_deleted_by_who_made_it(
    serve: Cluster, before: str, deleted: bool
) -> None:
    serve.status, serve.fails = before, True
    with pytest.raises(ServingError, match="did not start: why it is so"):
        start("m", "home")
    assert serve.done == ["run", "delete lepton-m"][: 1 + deleted]


def test_one_that_is_being_started_is_waited_for(
    serve: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve.status, serve.replicas = "DEPLOYING", {"STARTING": 1}
    with pytest.raises(ServingError, match="does not come up: why it is so; close it and start"):
        start("m", "home")
    monkeypatch.setattr(app, "WAIT_S", 60)

    def comes_up(_: float) -> None:
        serve.status, serve.replicas = "RUNNING", {"RUNNING": 1}

    monkeypatch.setattr(app.time, "sleep", comes_up)
    start("m", "home", service=Service())
    assert serve.done == []


class Loading(App):
    """An application whose replicas can load some versions only."""

    home = ""
    broken: frozenset[int] = frozenset()

    def wait_for(self, seq: int, timeout_s: float = 0.0) -> None:
        """Refuse a champion that cannot be loaded."""
        champion = Registry(f"{self.home}/registry").state("m").pointer.champion
        if champion in self.broken:
            raise ServingError(f"version {champion} cannot be loaded")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Cluster) -> Registry:
    made = Registry(f"{tmp_path}/registry")
    for _ in range(2):
        made.register("m", checkpoint="c.json", manifest_sha256="s")
    monkeypatch.setattr(promoting, "_verify", lambda _: None)
    monkeypatch.setattr(Loading, "home", str(tmp_path))
    monkeypatch.setattr(Loading, "broken", frozenset({1}))

    def begin(*_: object, **__: object) -> App:
        found = Loading("m", "", application="lepton-m")
        if not serve.status:
            found.wait_for(0)  # the first replica has to load the champion
            serve.run()
        return found

    monkeypatch.setattr(promoting, "start", begin)
    return made


def test_a_first_version_that_cannot_be_served_is_withdrawn(
    registry: Registry, tmp_path: Path
) -> None:
    with pytest.raises(ServingError, match="version 1 cannot be loaded"):
        promote("m", 1, home=tmp_path)
    assert registry.state("m").pointer.champion is None
    last = registry.history("m")[-1]
    assert (last.kind, last.reason) == ("withdrawn", "version 1 cannot be loaded")
    assert promote("m", 2, home=tmp_path).state() == "ready"
    assert registry.state("m").pointer.champion == 2


def test_a_champion_that_cannot_be_loaded_any_more_is_in_nobodys_way(
    registry: Registry, tmp_path: Path
) -> None:
    registry.promote("m", 1, expect=None)
    with pytest.raises(ServingError, match="tried beside version 1: promote it without canary="):
        promote("m", 2, canary=0.5, home=tmp_path)
    assert registry.state("m").pointer.champion == 1
    assert promote("m", 2, home=tmp_path).state() == "ready"
    assert registry.state("m").pointer.champion == 2


def test_an_application_that_was_started_for_nothing_is_closed_again(
    registry: Registry, tmp_path: Path, serve: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.promote("m", 2, expect=None)

    def begin(*_: object, **__: object) -> App:
        serve.run()
        return Loading("m", "", application="lepton-m")

    monkeypatch.setattr(promoting, "start", begin)
    with pytest.raises(ServingError, match="version 1 cannot be loaded"):
        promote("m", 1, home=tmp_path)
    assert registry.state("m").pointer.champion == 2
    assert serve.done == ["run", "delete lepton-m"]


def test_only_a_first_champion_is_withdrawn(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="has no first champion to withdraw"):
        registry.withdraw("m", expect=None, reason="")
    registry.promote("m", 1, expect=None)
    registry.start_canary("m", 2, 0.5, expect=None)
    with pytest.raises(RegistryError, match="has no first champion to withdraw"):
        registry.withdraw("m", expect=None, reason="")
    registry.promote("m", 2, expect=None)
    with pytest.raises(RegistryError, match="has no first champion to withdraw"):
        registry.withdraw("m", expect=None, reason="")


@pytest.fixture
def asked(serve: Cluster, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have the replicas answer in turn as told; the last one again and again."""

    def say(*answers: Any) -> None:
        left = list(answers)

        def results(timeout_s: float) -> Any:
            said = left.pop(0) if len(left) > 1 else left[0]
            if isinstance(said, Exception):
                raise said
            return said

        handle = SimpleNamespace(broadcast=lambda *_: SimpleNamespace(results=results))
        monkeypatch.setattr(client.serve, "get_app_handle", lambda _: handle)

    monkeypatch.setattr(client, "FOLLOW_S", 0.01)
    monkeypatch.setattr(client, "SETTLE_S", 0.0)
    return say


def test_a_replica_that_dies_meanwhile_has_a_successor(
    asked: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = App("m", "", application="lepton-m")
    there = [{"seq": 3, "error": "", "short": False}]
    asked(ActorDiedError(), ActorDiedError(), there)
    served.wait_for(3)
    asked(RayTaskError("follow", "it raised", ValueError("it raised")), there)
    with pytest.raises(ServingError, match="cannot be asked"):
        served.wait_for(3)
    monkeypatch.setattr(client, "SUCCESSOR_S", 0.05)
    asked(ActorDiedError())
    with pytest.raises(ServingError, match="die when asked"):
        served.wait_for(3)
