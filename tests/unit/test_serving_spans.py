"""Spans of a replica: under whom a version is loaded, and which requests are always kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import lepton
from lepton.registry import Registry, asked_for_by
from lepton.serving.following import Follower
from lepton.telemetry import Carrier, SpanRecord, spans_of


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
