"""A replica in this process, asked over ASGI: what it says when it is slow, full or asked amiss."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import pyarrow as pa
import pytest
import torch

import lepton
from lepton import checkpoints
from lepton.errors import LeptonError, RegistryError, ServingError
from lepton.registry import Registry
from lepton.serving import tables
from lepton.serving.following import Follower, manifest_of, resident_of
from lepton.serving.inputs import MAX_ROWS
from lepton.serving.protocol import outputs_of_reply, raw_request_of, request_of
from lepton.serving.replica import Replica
from lepton.serving.room import Room
from lepton.telemetry import Carrier, spans_of
from tests.unit.served import INPUTS, URL, body, register_model, slow

ROWS = pa.table({"x": [[0.0, 1.0, 2.0]]}, schema=pa.schema({"x": pa.list_(pa.float32())}))
RAW, JSON_LENGTH = raw_request_of({"x": np.array([[0, 1, 2]], "float32")})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return register_model(tmp_path_factory.mktemp("home"), "m")


@pytest.fixture
def replica(home: Path) -> Any:
    made = Replica("m", str(home))
    yield made
    made.__del__()


def client(replica: Replica) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(replica.__serve_build_asgi_app__())
    return httpx.AsyncClient(transport=transport, base_url="http://here")


def test_too_much_work_is_refused_with_the_time_to_come_again(replica: Replica) -> None:
    async def scene() -> None:
        held: Any = slow(replica, 1.0)
        async with client(replica) as http:
            first = asyncio.create_task(http.post(URL, content=body(4)))
            await asyncio.to_thread(held.running.wait, 30)
            refused = await http.post(URL, content=body())
            health = (await http.get("/v2/health/ready")).json()
            held.go.set()
            assert (await first).status_code == 200
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "4"
        assert refused.headers["content-type"] == "application/problem+json"
        assert "overloaded" in refused.json()["detail"]
        assert (health["state"], health["waiting_rows"]) == ("ready", 4)

    asyncio.run(scene())


def test_a_request_whose_time_is_over_is_told_so(replica: Replica) -> None:
    async def scene() -> None:
        held: Any = slow(replica, 0.1)
        async with client(replica) as http:
            late = await http.post(URL, content=body(parameters={"timeout": 20_000}))
            held.go.set()
        assert late.status_code == 504
        assert "time was over" in late.json()["detail"]

    asyncio.run(scene())


FORMS: dict[str, tuple[str, bytes, dict[str, str]]] = {
    "JSON": (URL, body(), {}),
    "raw": (URL, RAW, {"inference-header-content-length": str(JSON_LENGTH)}),
    "Arrow": (URL, tables.stream_of_rows(ROWS), {"content-type": tables.MEDIA_TYPE}),
    "plain": ("/predict", b'{"rows": [{"x": [0, 1, 2]}]}', {}),
    "of a version": ("/v2/models/m/versions/1/predict", b'{"rows": [{"x": [0, 1, 2]}]}', {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_request_of_any_form_may_tell_how_long_its_client_waits(
    replica: Replica, form: str
) -> None:
    path, content, headers = FORMS[form]

    async def scene() -> None:
        held: Any = slow(replica, 0.1)
        replica._follower.resident = {1: held}
        async with client(replica) as http:

            async def ask(told: str) -> httpx.Response:
                return await http.post(
                    path, content=content, headers=headers | {"x-request-timeout-ms": told}
                )

            late = await ask("20")
            wrong = [await ask(told) for told in ("soon", "-1", "1.5", "9" * 13)]
            held.go.set()
            assert [(await ask(told)).status_code for told in ("60000", "0")] == [200, 200]
        assert late.status_code == 504
        assert "time was over" in late.json()["detail"]
        assert {w.status_code for w in wrong} == {400}
        assert "x-request-timeout-ms must be a whole number of mill" in wrong[0].json()["detail"]

    asyncio.run(scene())


def test_the_shorter_of_two_deadlines_counts(replica: Replica) -> None:
    async def scene() -> None:
        held: Any = slow(replica, 0.1)
        async with client(replica) as http:
            for header, timeout in (("20", 60_000_000), ("60000", 20_000)):
                content = body(parameters={"timeout": timeout})
                late = await http.post(
                    URL, content=content, headers={"x-request-timeout-ms": header}
                )
                assert late.status_code == 504
        held.go.set()

    asyncio.run(scene())


def test_a_request_answered_at_once_may_have_a_deadline(replica: Replica) -> None:
    async def scene() -> None:
        async with client(replica) as http:
            await http.post(URL, content=body())
        replica._batcher._known(replica._follower.now.champion.run).took(1, 1e-4)
        assert await replica.at_once({}, body()) is not None
        assert await replica.at_once({b"x-request-timeout-ms": b"100"}, body()) is not None
        assert await replica.at_once({b"x-request-timeout-ms": b"soon"}, body()) is None

    asyncio.run(scene())


def test_a_slow_requests_span_tells_of_its_batch(
    replica: Replica, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lepton.serving.outcome.SLOW_NS", 0)
    monkeypatch.setattr("lepton.serving.pace.BATCH_S", 60)  # however busy this machine is

    async def scene() -> list[Any]:
        held: Any = slow(replica, 0.1)
        async with client(replica) as http:
            first = asyncio.create_task(http.post(URL, content=body(4)))
            await asyncio.to_thread(held.running.wait, 30)
            rest = [asyncio.create_task(http.post(URL, content=body(n))) for n in (1, 2)]
            while replica._batcher.waiting_rows < 7:
                await asyncio.sleep(0.01)
            held.go.set()
            return [(await task).headers["traceparent"] for task in (first, *rest)]

    asked = asyncio.run(scene())
    replica.__del__()
    spans = spans_of(str(home / "traces"))
    batches = {s.parent_id: s for s in spans if s.name == "lepton.batch"}
    told = [batches[header.split("-")[2]].attributes for header in asked]

    assert told[0] == {"lepton.requests": 1, "lepton.rows": 4}
    assert told[1] == told[2] == {"lepton.requests": 2, "lepton.rows": 3}


def test_the_log_of_a_failed_request_has_no_row_of_it(
    replica: Replica, caplog: pytest.LogCaptureFixture
) -> None:
    class Telling:
        """Fails as code that speaks of what it was given does."""

        def __init__(self, inner: Any) -> None:
            self._inner = inner
            self.as_arrays = False

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def run(self, rows: Any) -> Any:
            raise ValueError("cannot read " + "secret" * len(rows))

    follower = replica._follower
    telling: Any = Telling(follower.now.champion)
    follower.now = replace(follower.now, champion=telling)

    async def scene() -> None:
        async with client(replica) as http:
            assert (await http.post(URL, content=body(2))).status_code == 500

    asyncio.run(scene())
    (said,) = [r for r in caplog.records if "failed a request" in r.getMessage()]
    assert "by ValueError" in said.getMessage()
    assert "in run" in said.getMessage()  # where it was
    assert "secretsecret" not in caplog.text
    assert said.exc_info is None


def test_a_wrong_timeout_is_refused(replica: Replica) -> None:
    async def scene() -> None:
        async with client(replica) as http:
            reply = await http.post(URL, content=body(parameters={"timeout": -1}))
        assert reply.status_code == 400
        assert "microseconds" in reply.json()["detail"]

    asyncio.run(scene())


def test_every_request_leaves_a_span_but_those_the_client_did_not_sample(
    replica: Replica, home: Path
) -> None:
    sampled, unsampled, failed = (f"00-{c * 32}-{c * 16}" for c in "abc")

    async def scene() -> None:
        async with client(replica) as http:
            for header, content in (
                (f"{sampled}-01", body()),
                (f"{unsampled}-00", body()),
                (f"{unsampled}-00", b"no json"),
            ):
                reply = await http.post(URL, content=content, headers={"traceparent": header})
                assert reply.headers["traceparent"][:35] == header[:35]
            held: Any = slow(replica, 0.1)
            late = body(parameters={"timeout": 20_000})
            await http.post(URL, content=late, headers={"traceparent": f"{failed}-00"})
            held.go.set()

    asyncio.run(scene())
    replica._spans.flush()
    traces = str(home / "traces")
    (span,) = [s for s in spans_of(traces, "a" * 32) if s.name == "lepton.request"]
    assert (span.name, span.parent_id, span.status) == ("lepton.request", "a" * 16, "ok")
    assert span.attributes["http.response.status_code"] == 200
    assert spans_of(traces, "b" * 32) == []
    (span,) = spans_of(traces, "c" * 32)  # what failed is recorded all the same
    assert (span.status, span.attributes["error.type"]) == ("error", "Timeout")


def test_plain_rows_are_answered_like_tensors(replica: Replica) -> None:
    async def scene() -> None:
        rows = [{"x": [0.0, 1.0, 2.0]}, {"x": [3, 4, 5]}]
        async with client(replica) as http:
            plain = await http.post("/predict", json={"rows": rows, "id": "me"})
            x = pa.table({"x": [r["x"] for r in rows]})
            tensor = (await http.post(URL, content=request_of(x, INPUTS))).json()
            document = (await http.get("/openapi.json")).json()
        assert plain.status_code == 200
        told = plain.json()
        assert (told["model"], told["version"], told["id"]) == ("m", 1, "me")
        answers = np.array([r["output"] for r in told["rows"]]).reshape(-1)
        assert np.allclose(answers, tensor["outputs"][0]["data"])
        for way in document["paths"].values():
            (header,) = way["post"]["parameters"]
            assert (header["in"], header["name"]) == ("header", "x-request-timeout-ms")
        asked = document["paths"]["/predict"]["post"]["requestBody"]["content"]
        schema = asked["application/json"]["schema"]
        jsonschema.validate({"rows": rows}, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"rows": [{"x": [1.0]}]}, schema)

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no", "not JSON"),
        (b"[]", "no list 'rows'"),
        (b'{"rows": []}', "there are 0 rows"),
        (b'{"rows": [1]}', "no list 'rows'"),
        (b'{"rows": [{"x": [1, 2]}]}', "not nested as its shape"),
        (b'{"rows": [{"x": [1, 2, "a"]}]}', "not FP32"),
        (b'{"rows": [{"x": [1, 2, true]}]}', "not FP32"),
        (b'{"rows": [{"x": [1, 2, null]}]}', "null is not allowed"),
        (b'{"rows": [{"x": [1, 2, 3]}, {}]}', "row 1: the model misses ['x']"),
        (b'{"rows": [{"x": [1, 2, 3], "z": 1}]}', "row 0: the model does not know ['z']"),
        (b'{"rows": [{"x": [1, 2, 3]}], "id": 7}', "'id' must be a string"),
    ],
)
def test_wrong_rows_are_told_what_was_expected(
    replica: Replica, content: bytes, words: str
) -> None:
    async def scene() -> None:
        async with client(replica) as http:
            reply = await http.post("/predict", content=content)
        assert reply.status_code == 400
        assert words in reply.json()["detail"]

    asyncio.run(scene())


def test_a_replica_answers_the_same_wherever_it_computes(replica: Replica, home: Path) -> None:
    """With "cpu:0" everything is done that another device needs."""
    elsewhere = Replica("m", str(home), room=Room(device="cpu:0"))

    async def answer(one: Replica) -> tuple[Any, Any]:
        async with client(one) as http:
            health = (await http.get("/v2/health/ready")).json()
            return health["device"], (await http.post(URL, content=body(3))).json()["outputs"]

    try:
        here, there = (asyncio.run(answer(one)) for one in (replica, elsewhere))
    finally:
        elsewhere.__del__()
    assert (here[0], there[0]) == ("cpu", "cpu:0")
    assert here[1] == there[1]


def test_a_version_answers_in_this_process_as_in_a_replica(replica: Replica, home: Path) -> None:
    x = np.random.default_rng(1).normal(size=(MAX_ROWS + 5, 3)).astype("float32")
    table = pa.table({"x": list(x), "other": list(range(len(x)))})
    loaded = lepton.load("m", home=home)
    expected = loaded.predict({"x": x})["output"]

    async def scene() -> Any:
        async with client(replica) as http:
            content, length = raw_request_of({"x": x[:50]})
            headers = {"inference-header-content-length": str(length)}
            reply = await http.post(URL, content=content, headers=headers)
            told = reply.headers["inference-header-content-length"]
            return outputs_of_reply(reply.content, told)["output"]

    assert (loaded.model, loaded.version) == ("m", 1)
    assert expected.shape == (len(x), 2)
    assert np.allclose(asyncio.run(scene()), expected[:50])
    for given in (table, table.to_pandas(), {"x": torch.from_numpy(x)}):
        assert np.array_equal(loaded.predict(given)["output"], expected)
    registered = Registry(f"{home}/registry").version("m", 2)
    assert lepton.load(registered, home=home).version == 2
    for wrong, words in (
        ({"y": x}, "takes columns"),
        ({"x": x[:, :2]}, "wanted"),
        ({"x": x * np.nan}, "m version 1: input 'x': values must be finite"),
        ({"x": x[:0]}, "m version 1: there are 0 rows"),
    ):
        with pytest.raises(ServingError, match=words):
            loaded.predict(wrong)
    with pytest.raises(RegistryError, match="no model 'nobody'"):
        lepton.load("nobody", home=home)


def test_a_checkpoint_that_was_changed_is_not_loaded(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home, tmp_path / "home")
    entry = Registry(f"{home}/registry").version("m", 1)
    moved = replace(entry, checkpoint=entry.checkpoint.replace(str(home), f"{tmp_path}/home"))
    assert resident_of(moved, manifest_of(moved), "cpu").version == 1
    with pytest.raises(LeptonError, match="its manifest has changed"):
        manifest_of(replace(moved, manifest_sha256="0" * 64))
    for file in Path(manifest_of(moved).path("state.safetensors")).parent.glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(LeptonError):
        resident_of(moved, manifest_of(moved), "cpu")


def test_a_registry_that_cannot_be_read_stops_no_replica(
    replica: Replica, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", "lepton")

    async def scene() -> None:
        async with client(replica) as http:
            for _ in range(3):
                told = await replica.follow()
                assert (told["champion"], told["error"]) == (1, "")
                assert (await http.post(URL, content=body())).status_code == 200

    commits = home / "registry" / "_delta_log"
    broken = commits / f"{len(list(commits.glob('*.json'))):020}.json"
    broken.write_text("no commit")
    try:
        asyncio.run(scene())
    finally:
        broken.unlink()
    said = [r.getMessage() for r in caplog.records if "cannot read the registry" in r.getMessage()]
    assert len(said) == len(set(said)) >= 1  # not four times a second
    assert asyncio.run(replica.follow())["champion"] == 1
    assert not replica._follower._unread  # it is read again


def test_a_load_whose_storage_was_away_is_tried_again(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "registry", tmp_path / "registry")
    registry = Registry(f"{tmp_path}/registry")
    follower = Follower("m", str(tmp_path), Carrier())
    follower.close()  # it looks only when it is told to
    place = Path(registry.version("m", 2).checkpoint).parent
    away = place.with_name("away")
    place.rename(away)
    place.write_text("no folder, so that reading fails as from a store that does not answer")
    try:
        registry.promote("m", 2, expect=registry.state("m").pointer.seq, gate=[], trace_id="")
        follower._pause_s = 0
        told = follower.follow()
        assert (told["champion"], told["seq"]) == (1, registry.state("m").pointer.seq)
        assert "cannot read checkpoint" in told["error"]
        assert follower.follow()["champion"] == 1
    finally:
        place.unlink()
        away.rename(place)
    told = follower.follow()
    assert (told["champion"], told["error"]) == (2, "")


WEIGHTS = 32
"""Bytes that the net's weights take."""


def elsewhere_of(home: Path, tmp_path: Path) -> Registry:
    """Return a registry of one's own, with the same versions."""
    shutil.copytree(home / "registry", tmp_path / "registry")
    return Registry(f"{tmp_path}/registry")


def moved(registry: Registry, version: int) -> int:
    return registry.promote("m", version, expect=None).pointer.seq


def test_a_version_that_does_not_fit_beside_another_changes_nothing_until_it_may(
    home: Path, tmp_path: Path
) -> None:
    registry = elsewhere_of(home, tmp_path)
    replica = Replica("m", str(tmp_path), room=Room(most=2 * WEIGHTS - 1), elsewhere=True)
    replica._follower.close()  # it looks only when it is told to

    async def scene() -> None:
        async with client(replica) as http:
            seq = moved(registry, 2)
            told = await replica.follow()
            assert (told["champion"], told["seq"], told["short"]) == (1, seq, True)
            assert (
                "32 bytes of weights) does not fit into memory on cpu: 1 bytes are" in told["error"]
            )
            assert (await http.post(URL, content=body())).headers["x-lepton-version"] == "1"
            held: Any = slow(replica, 0.1)
            first = asyncio.create_task(http.post(URL, content=body()))
            await asyncio.to_thread(held.running.wait, 30)
            replacing = asyncio.create_task(replica.replace())
            while not replica._absence.away:
                await asyncio.sleep(0)
            sent = await http.post(URL, content=body())
            health = await http.get("/v2/health/ready")
            held.go.set()
            told = await replacing
            after = await http.post(URL, content=body())
        assert (sent.status_code, health.status_code) == (425, 503)
        assert health.json()["state"] == "draining"
        assert ((await first).headers["x-lepton-version"], (await first).status_code) == ("1", 200)
        assert (told["champion"], told["error"], told["short"]) == (2, "", False)
        assert (after.status_code, after.headers["x-lepton-version"]) == (200, "2")
        assert list(replica._follower.resident) == [2]

    try:
        asyncio.run(scene())
    finally:
        replica.__del__()


def copied(registry: Registry, place: Path) -> int:
    """Register a version whose checkpoint is a copy of the first one's, and return its number."""
    one = registry.version("m", 1)
    manifest = Path(one.checkpoint)
    shutil.copytree(manifest.parent, place)
    uri = str(place / manifest.name)
    return registry.register("m", checkpoint=uri, manifest_sha256=one.manifest_sha256).version


def test_a_version_that_fails_where_the_other_had_to_go_leaves_the_other(
    home: Path, tmp_path: Path
) -> None:
    registry = elsewhere_of(home, tmp_path)
    broken = copied(registry, tmp_path / "copy")
    follower = Follower("m", str(tmp_path), Carrier(), Room(most=WEIGHTS))
    follower.close()
    state = checkpoints.load(registry.version("m", broken).checkpoint).path(checkpoints.STATE)
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    seq = moved(registry, broken)
    assert follower.follow()["short"]
    follower.replace()
    told = follower.follow()
    assert (told["champion"], told["seq"], told["short"], follower.lost) == (1, seq, False, False)
    assert "does not match its hash" in told["error"]
    rows = pa.table({"x": [[0.0, 1.0, 2.0]]}, schema=pa.schema([("x", pa.list_(pa.float32(), 3))]))
    assert follower.now.champion.run(rows)["output"].shape == (1, 2)
    registry.rollback("m", expect=None, reason="broken")
    assert follower.follow()["error"] == ""


def test_who_can_load_neither_says_so(home: Path, tmp_path: Path) -> None:
    registry = elsewhere_of(home, tmp_path)
    ours = [copied(registry, tmp_path / name) for name in ("one", "two")]
    moved(registry, ours[0])
    follower = Follower("m", str(tmp_path), Carrier(), Room(most=WEIGHTS))
    follower.close()
    moved(registry, ours[1])
    for name in ("one", "two"):
        shutil.rmtree(tmp_path / name)
    with pytest.raises(LeptonError, match="no checkpoint at"):
        follower.replace()
    assert follower.lost


def test_the_former_champion_goes_first_where_a_third_version_does_not_fit(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", "lepton")
    registry = elsewhere_of(home, tmp_path)
    third = copied(registry, tmp_path / "copy")
    follower = Follower("m", str(tmp_path), Carrier(), Room(most=2 * WEIGHTS))
    follower.close()
    for version, resident in ((2, {1, 2}), (third, {2, third})):
        moved(registry, version)
        told = follower.follow()
        assert (told["champion"], told["error"]) == (version, "")
        assert set(follower.resident) == resident
    said = [r.getMessage() for r in caplog.records if "lets go of version 1" in r.getMessage()]
    assert len(said) == 1
    with pytest.raises(LeptonError, match=r"does not fit into memory.*in memory: none"):
        Follower("m", str(tmp_path), Carrier(), Room(most=WEIGHTS - 1))
