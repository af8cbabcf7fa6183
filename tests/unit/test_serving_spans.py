"""Spans of a replica: under whom a version is loaded, and which requests are always kept."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch

import lepton
from lepton.registry import Registry, asked_for_by
from lepton.serving.following import Follower, Resident
from lepton.serving.replica import Replica
from lepton.telemetry import Carrier, SpanRecord, entries_of, spans_of
from lepton.telemetry.conventions import strays


def parent(digit: str) -> str:
    """Return the traceparent of somebody's span."""
    return f"00-{digit * 32}-{digit * 16}-01"


def loop(worker: Any) -> None:
    net = torch.nn.Linear(3, 2)
    worker.attach(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.1))
    for batch in worker.batches():
        scores = net(batch["x"])
        worker.step(torch.nn.functional.cross_entropy(scores, batch["y"], reduction="sum"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    x = np.random.default_rng(0).normal(size=(60, 3)).astype("float32")
    rows = pa.table({"x": list(x), "y": (x.sum(1) > 0).astype("int64")})
    table = lepton.write(rows, home / "t")
    run = lepton.train(loop, table.stream(batch_size=20), name="r", home=str(home))
    for _ in range(3):
        lepton.register(run, "m", metrics={}, home=str(home))
    return home


@pytest.fixture
def own(home: Path, tmp_path: Path) -> Path:
    """A home with a registry of its own, whose version 1 is champion by the span ``a``."""
    shutil.copytree(home / "registry", tmp_path / "registry")
    Registry(f"{tmp_path}/registry").promote("m", 1, expect=None, traceparent=parent("a"))
    return tmp_path


@pytest.fixture
def follower(own: Path) -> Follower:
    made = Follower("m", str(own), Carrier(parent("0"), str(own / "traces")))
    made.close()  # it looks only when it is told to
    return made


def loads(own: Path) -> list[SpanRecord]:
    return [s for s in spans_of(str(own / "traces")) if s.name == "lepton.model.load"]


def under(span: SpanRecord) -> str:
    return f"00-{span.trace_id}-{span.parent_id}-01"


def test_a_load_belongs_to_the_promotion_that_asked_for_it(own: Path, follower: Follower) -> None:
    registry = Registry(f"{own}/registry")
    registry.start_canary("m", 2, 0.1, expect=None, traceparent=parent("b"))
    follower.follow()
    registry.promote("m", 2, expect=None, traceparent=parent("c"))
    registry.start_shadow("m", 3, 0.1, expect=None, traceparent=parent("d"))
    follower.follow()
    again = Follower("m", str(own), Carrier(parent("0"), str(own / "traces")))  # as if restarted
    again.close()

    found = [(s.attributes["lepton.version"], under(s)) for s in loads(own)]
    assert found[:3] == [(1, parent("a")), (2, parent("b")), (3, parent("d"))]
    assert found[3:] == [(2, parent("c")), (3, parent("d"))]
    trained = registry.version("m", 2).lineage["traceparent"].split("-")
    assert {s.attributes["lepton.model"] for s in loads(own)} == {"m"}
    assert [s.links for s in loads(own)] == [[":".join(trained[1:3])]] * 5
    assert follower.resident[2].deployment == parent("b")
    assert again.resident[2].deployment == parent("c")


def test_a_version_that_is_gone_back_to_belongs_to_the_rollback(own: Path) -> None:
    registry = Registry(f"{own}/registry")
    registry.promote("m", 2, expect=None, traceparent=parent("b"))
    registry.rollback("m", expect=None, reason="", traceparent=parent("c"))
    registry.start_canary("m", 3, 0.1, expect=None)

    events = registry.history("m")
    assert [asked_for_by(events, n) for n in (1, 3)] == [parent("c"), ""]
    assert asked_for_by([], 1) == ""


def test_a_load_that_fails_leaves_a_span(own: Path, follower: Follower) -> None:
    registry = Registry(f"{own}/registry")
    first = registry.version("m", 1)
    bad = registry.register("m", checkpoint=first.checkpoint, manifest_sha256="other")
    unsampled = parent("b")[:-1] + "0"
    registry.promote("m", bad.version, expect=None, traceparent=unsampled)
    assert "its manifest has changed" in follower.follow()["error"]

    failed = loads(own)[-1]
    assert (failed.status, failed.attributes["lepton.version"]) == ("error", bad.version)
    assert failed.attributes["error.type"] == "LeptonError"
    assert under(failed) == parent("b")


def moved(own: Path, **more: Any) -> None:
    """Put a version on trial as a shadow that is asked always."""
    Registry(f"{own}/registry").start_shadow("m", 2, 1.0, expect=None, **more)


def ask(replica: Replica, *asked: tuple[str, bytes, dict[str, str]]) -> list[httpx.Response]:
    """Post bodies to paths, one after another, and wait until all spans are written."""

    async def scene() -> list[httpx.Response]:
        app = replica.__serve_build_asgi_app__()
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app, root_path="/m"), base_url="http://here"
        ) as http:
            found = [await http.post(f"/m{p}", content=b, headers=h) for p, b, h in asked]
        while replica._mirrors:
            await asyncio.sleep(0.01)
        return found

    found = asyncio.run(scene())
    replica._spans.flush()
    return found


URL = "/v2/models/m/infer"
BODY = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,3],"data":[[0,1,2]]}]}'


@pytest.fixture
def replica(own: Path) -> Iterator[Replica]:
    made = Replica("m", str(own), Carrier(parent("0"), str(own / "traces")))
    yield made
    made.__del__()


def of(own: Path, digit: str, name: str = "lepton.request") -> list[SpanRecord]:
    return [s for s in spans_of(str(own / "traces"), digit * 32) if s.name == name]


def test_a_request_says_what_was_asked_and_what_answers(own: Path, replica: Replica) -> None:
    pinned = "/v2/models/m/versions/1/infer"
    sampled = {"traceparent": parent("5")}
    ask(replica, (URL, BODY, sampled), (pinned, BODY, sampled), (URL, b"rubbish", sampled))
    one, other, wrong = of(own, "5")

    told = {k: v for k, v in one.attributes.items() if not k.startswith("lepton.")}
    assert told == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": f"/m{URL}",
        "url.path": f"/m{URL}",
        "url.scheme": "http",
    }
    assert other.attributes["url.path"] == f"/m{pinned}"
    assert other.attributes["http.route"] == "/m/v2/models/m/versions/{version}/infer"
    assert one.attributes["lepton.deployment.trace"] == parent("a")
    trained = Registry(f"{own}/registry").version("m", 1).lineage["traceparent"]
    assert one.links == [":".join(t.split("-")[1:3]) for t in (trained, parent("a"))]
    assert (wrong.status, wrong.attributes["error.type"]) == ("ok", "BadRequest")
    assert [a for s in (one, other, wrong) for a in strays(s.name, s.attributes)] == []


def test_what_came_as_baggage_goes_back_with_the_versions_words(replica: Replica) -> None:
    sent = {"baggage": "team=core,lepton.version=9"}
    with_it, without = ask(replica, (URL, BODY, sent), (URL, BODY, {}))
    quick = asyncio.run(replica.at_once({b"baggage": b"team=core"}, BODY))

    words = entries_of(without.headers["baggage"])
    assert words["lepton.version"] == "1"
    assert entries_of(with_it.headers["baggage"]) == {"team": "core", **words}
    if quick is not None:
        assert entries_of(dict(quick[0])[b"baggage"].decode()) == {"team": "core", **words}


def test_a_shadows_failure_is_kept_under_an_unsampled_request(
    own: Path, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved(own, traceparent=parent("b"))
    replica._follower.follow()
    shadow = replica._follower.now.shadow
    assert shadow is not None

    class Failing(Resident):
        def run(self, rows: Any) -> Any:
            raise RuntimeError("a secret")

    told = {f.name: getattr(shadow, f.name) for f in fields(shadow)}
    monkeypatch.setattr(
        replica._follower, "now", replace(replica._follower.now, shadow=Failing(**told))
    )
    ask(replica, (URL, BODY, {"traceparent": f"{parent('6')[:-1]}0"}))

    (failed,) = of(own, "6")
    assert (failed.attributes["lepton.variant"], failed.status) == ("shadow", "error")
    assert failed.attributes["error.type"] == "RuntimeError"
    assert strays(failed.name, failed.attributes) == []


def test_one_of_a_seconds_batches_is_told_with_the_models_run(own: Path, replica: Replica) -> None:
    champion = replica._follower.now.champion
    replica._batcher._known(champion.run).took(1, 1.0)  # none is answered at once
    begun = time.time_ns()
    ask(replica, *3 * [(URL, BODY, {"traceparent": parent("7")})])
    took_s = (time.time_ns() - begun) / 1e9

    requests, batches, runs = (
        of(own, "7", f"lepton.{name}") for name in ("request", "batch", "model.run")
    )
    assert len(requests) == 3
    assert 1 <= len(batches) <= 1 + took_s
    assert {b.parent_id for b in batches} <= {r.span_id for r in requests}
    assert [r.parent_id for r in runs] == [b.span_id for b in batches]
    assert batches[0].start_ns <= runs[0].start_ns <= runs[0].end_ns <= batches[0].end_ns
