"""The registry: a log of events in a Delta table."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from lepton.errors import ConflictError, RegistryError
from lepton.promotion.gates import check_all
from lepton.registry import Event, ModelState, ModelVersion, Pointer, Registry, log

START = datetime(2026, 1, 1, tzinfo=UTC)


def event(seq, kind, model="m", **fields):
    return Event(model=model, seq=seq, time=START + timedelta(seconds=seq), kind=kind, **fields)


def registered(seq, version, model="m"):
    entry = ModelVersion(
        model=model, version=version, checkpoint="c", manifest_sha256="s", created=START
    )
    return event(seq, "registered", version=version, registered=entry)


def put(registry, model="m", **fields):
    return registry.register(model, checkpoint="c.json", manifest_sha256="s", **fields)


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "home" / "registry")


def test_an_unwritten_registry_is_empty(registry, tmp_path):
    assert registry.models() == []
    assert registry.state("m") == ModelState(model="m")
    assert registry.history("m") == []
    with pytest.raises(RegistryError, match=r"no model 'm' .* it has: \[\]"):
        registry.version("m", 1)
    assert not (tmp_path / "home").exists()


def test_a_version_reads_back_as_it_was_registered(registry):
    entry = put(
        registry,
        metrics={"accuracy": 0.981, "count": 3},
        lineage={"table": "lake/digits", "table_version": 12, "cursor": {"rows": [1, 2]}},
        signature={"inputs": [{"name": "pixels", "shape": [-1, 64]}]},
        tags={"owner": "ä"},
        size=77,
        trace_id="ab" * 16,
    )
    other = Registry(registry.uri)
    assert other.version("m", 1) == registry.version("m", 1) == entry
    assert (entry.version, entry.parent, entry.metrics["count"]) == (1, None, 3.0)
    row = DeltaTable(registry.uri).to_pyarrow_table().to_pylist()[0]
    assert (row["kind"], row["checkpoint"], row["trace_id"]) == ("registered", "c.json", "ab" * 16)
    assert other.history("m")[0].trace_id == "ab" * 16
    assert "@" in row["actor"]


def test_a_life_of_promotions(registry):
    for _ in range(3):
        put(registry)
    gate = check_all(["accuracy > 0.9"], {"accuracy": 0.95})
    state = registry.promote("m", 1, expect=3, gate=gate, trace_id="t1")
    state = registry.start_canary("m", 2, 0.1, expect=state.pointer.seq, gate=[{"by": "hand"}])
    assert state.pointer == Pointer(champion=1, canary=2, share=0.1, seq=5)
    state = registry.abort_canary("m", expect=5, reason="slow")
    assert state.pointer == Pointer(champion=1, seq=6)
    registry.start_canary("m", 3, 1.0, expect=None)
    state = registry.promote("m", 3, expect=None)
    assert state.pointer == Pointer(champion=3, previous=1, seq=8)
    assert put(registry).parent == 3
    assert registry.version("m", "champion").version == 3
    assert registry.version("m", "previous").version == 1
    state = registry.rollback("m", expect=9, reason="worse")
    assert state.pointer == Pointer(champion=1, seq=10)
    other = Registry(registry.uri)
    assert other.state("m") == registry.state("m") == state
    history = other.history("m")
    assert [e.seq for e in history] == list(range(1, 11))
    assert history[3].gate[0]["details"] == ["accuracy = 0.95 > 0.9: passed"]
    assert (history[3].trace_id, history[5].reason, history[9].reason) == ("t1", "slow", "worse")
    for seen in history:
        assert other.at("m", seen.time).pointer.seq >= seen.seq
    assert other.at("m", history[0].time - timedelta(1)) == ModelState(model="m")


def test_refusals_leave_no_trace(registry):
    put(registry)
    registry.promote("m", 1, expect=1)
    version = DeltaTable(registry.uri).version()
    with pytest.raises(RegistryError, match=r"no version 7; it has: \[1\]"):
        registry.promote("m", 7, expect=2)
    with pytest.raises(RegistryError, match=r"no version 'canary'; it has: \[1\]"):
        registry.version("m", "canary")
    with pytest.raises(RegistryError, match="is none of model"):
        registry.version("m", "newest")
    with pytest.raises(RegistryError, match=r"no model 'n' .* it has: \['m'\]"):
        registry.version("n", 1)
    with pytest.raises(ConflictError, match="at event 2, not at event 1"):
        registry.rollback("m", expect=1, reason="")
    with pytest.raises(ValueError, match="no time zone"):
        registry.at("m", datetime(2026, 1, 1))
    for name in ("", "a/b", "../m", ".m", "m" * 129, "m\n"):
        with pytest.raises(ValueError, match="model name"):
            put(registry, name)
    for wrong in (float("nan"), float("inf"), True, "0.9", None):
        with pytest.raises(ValueError, match="metric 'accuracy' must be a finite"):
            put(registry, metrics={"accuracy": wrong})
    with pytest.raises(TypeError):
        put(registry, lineage={"seed": object()})
    with pytest.raises(ValueError, match="JSON"):
        put(registry, lineage={"loss": float("nan")})
    assert DeltaTable(registry.uri).version() == version


def test_polling_reads_only_what_is_new(registry, monkeypatch):
    put(registry)
    reader, read = Registry(registry.uri), []
    monkeypatch.setattr(
        reader, "_read", lambda uri, inner=reader._read: read.append(uri) or inner(uri)
    )
    first = reader.state("m")
    assert reader.state("m") is first
    put(registry)
    assert sorted(reader.state("m").versions) == [1, 2]
    assert len(read) == len(set(read)) == 2


def test_a_compacted_or_checkpointed_table_reads_the_same(registry):
    for model in ("m", "n", "m"):
        put(registry, model)
    reader = Registry(registry.uri)
    before = reader.state("m")
    opened = DeltaTable(registry.uri)
    opened.optimize.compact()
    opened.create_checkpoint()
    put(registry, "n")
    assert reader.models() == ["m", "n"]
    assert reader.state("m") == Registry(registry.uri).state("m") == before
    assert len(reader.history("n")) == 2


def test_another_models_commits_do_not_disturb_an_expectation(registry, monkeypatch):
    put(registry)
    busy = Registry(registry.uri)
    write = registry._write
    monkeypatch.setattr(registry, "_write", lambda *a: (put(busy, "other"), write(*a)))
    assert registry.promote("m", 1, expect=1).pointer.champion == 1
    assert put(registry).version == 2


def test_the_log_itself_stops_a_writer_that_decided_on_an_old_state(registry, monkeypatch):
    put(registry)
    put(registry)
    rival = Registry(registry.uri)
    write = registry._write

    def late(opened, chosen):
        monkeypatch.setattr(registry, "_write", write)
        rival.promote("m", 2, expect=2)
        write(opened, chosen)

    monkeypatch.setattr(registry, "_write", late)
    with pytest.raises(ConflictError, match="at event 3, not at event 2"):
        registry.promote("m", 1, expect=2)
    assert registry.state("m").pointer == Pointer(champion=2, seq=3)
    monkeypatch.setattr(registry, "_write", late)
    rival.promote = lambda *_, **__: put(rival)
    assert put(registry).version == 4


def test_who_finds_the_table_made_meanwhile_reads_it_first(registry, monkeypatch):
    rival = Registry(registry.uri)
    make = registry._make
    monkeypatch.setattr(registry, "_make", lambda: (put(rival), make()))
    assert put(registry).version == 2
    assert [e.seq for e in Registry(registry.uri).history("m")] == [1, 2]


def test_a_write_that_fails_changes_nothing(registry, monkeypatch):
    put(registry)
    monkeypatch.setattr(log, "SCHEMA", log.SCHEMA.append(pa.field("new", pa.int64())))
    with pytest.raises(RegistryError, match="cannot write to the registry"):
        registry.promote("m", 1, expect=1)
    assert registry.state("m").pointer == Pointer(seq=1)


def test_a_commit_that_fails_after_it_was_made_counts_once(registry, monkeypatch):
    put(registry)
    write = registry._write

    def made_yet_failed(opened, chosen):
        write(opened, chosen)
        raise OSError("the checkpoint could not be written")

    monkeypatch.setattr(registry, "_write", made_yet_failed)
    assert registry.promote("m", 1, expect=1).pointer.champion == 1
    assert put(registry).version == 2
    assert [e.kind for e in registry.history("m")] == ["registered", "promoted", "registered"]


def test_time_never_runs_backwards(registry, monkeypatch):
    put(registry)
    monkeypatch.setattr(log, "now", lambda: START)
    registry.promote("m", 1, expect=1)
    one, two = registry.history("m")
    assert one.time == two.time
    assert registry.at("m", one.time).pointer.champion == 1


def test_endless_conflicts_end(registry, monkeypatch):
    put(registry)
    monkeypatch.setattr(registry, "_commit", lambda *_, **__: None)
    with pytest.raises(ConflictError, match="too many writers"):
        put(registry)
    with pytest.raises(ConflictError, match="too many writers"):
        registry.promote("m", 1, expect=None)


def test_what_cannot_be_read_or_written_is_an_error_that_names_the_registry(tmp_path):
    write_deltalake(tmp_path / "other", pa.table({"x": [1]}))
    with pytest.raises(RegistryError, match=r"cannot read the registry .*other"):
        Registry(tmp_path / "other").models()
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryError, match=r"registry .*file"):
        put(Registry(tmp_path / "file"))
    with pytest.raises(RegistryError, match=r"cannot make the registry .*nosuch"):
        put(Registry("nosuch-scheme://bucket/registry"))


def test_a_file_that_is_late_is_read_at_the_next_look(registry, monkeypatch):
    put(registry)
    reader = Registry(registry.uri)
    read = reader._read

    def fails(uri):
        raise FileNotFoundError(uri)

    monkeypatch.setattr(reader, "_read", fails)
    with pytest.raises(RegistryError, match="cannot read the registry"):
        reader.models()
    monkeypatch.setattr(reader, "_read", read)
    assert reader.models() == ["m"]


def test_reads_through_an_object_store(registry):
    put(registry)
    stored = f"file://{registry.uri}"
    (path,) = DeltaTable(registry.uri).file_uris()
    assert Registry(stored)._read(f"file://{path}") == registry._read(path)
    assert Registry(stored).models() == ["m"]


def test_a_trial_goes_from_shadow_to_canary_and_may_pause(registry):
    for _ in range(3):
        put(registry)
    registry.promote("m", 1, expect=None)
    rule = {"bake_s": 2.0}
    shadow = registry.start_shadow("m", 2, 1.0, expect=None, rule=rule).pointer
    canary = registry.start_canary("m", 2, 0.2, expect=None, by="X-User", rule=rule).pointer
    paused = registry.pause("m", expect=None, reason="lunch").pointer
    with pytest.raises(RegistryError, match="version 2 of 'm' is on trial"):
        registry.start_canary("m", 3, 0.2, expect=None)
    read = Registry(registry.uri)

    assert shadow == Pointer(champion=1, shadow=2, share=1.0, seq=5)
    assert canary == Pointer(champion=1, canary=2, share=0.2, by="x-user", seq=6)
    assert paused == replace(canary, share=0.0, seq=7)
    assert read.state("m").pointer == paused
    assert read.version("m", "canary").version == 2
    assert read.history("m")[-2].details == {"by": "x-user", "rule": rule}
    ended = registry.abort_canary("m", expect=7, reason="no").pointer
    assert ended == Pointer(champion=1, seq=8)


def test_replicas_that_were_replaced_one_by_one_are_recorded(registry):
    put(registry)
    registry.promote("m", 1, expect=None)
    told = {"replicas": 2, "surge": True, "seconds": 1.5}
    state = registry.replaced("m", 1, details=told, reason="two do not fit", trace_id="ab" * 16)
    last = Registry(registry.uri).history("m")[-1]

    assert state.pointer == Pointer(champion=1, seq=3)
    assert (last.kind, last.version, last.details) == ("replaced", 1, told)
    assert (last.reason, last.trace_id) == ("two do not fit", "ab" * 16)
    with pytest.raises(RegistryError, match="has no version 7"):
        registry.replaced("m", 7, details=told, reason="")


def test_an_alias_means_a_version_until_it_is_moved(registry):
    for _ in range(2):
        put(registry)
    registry.promote("m", 1, expect=None)
    registry.alias("m", "challenger", 1)
    registry.alias("m", "challenger", 2)
    read = Registry(registry.uri)

    assert read.version("m", "challenger").version == 2
    assert read.state("m").pointer == Pointer(champion=1, seq=5)
    for wrong in ("champion", "7", "a b", ""):
        with pytest.raises(ValueError, match="alias"):
            registry.alias("m", wrong, 1)
    with pytest.raises(RegistryError, match="champion, previous, canary, shadow, challenger"):
        read.version("m", "newest")


def test_versions_are_described_measured_and_deleted(registry):
    for _ in range(3):
        put(registry, tags={"area": "x"})
    registry.promote("m", 1, expect=None)
    registry.describe("m", 2, tags={"owner": "me", "area": None}, note="slow", protected=True)
    registry.measure("m", 2, "lake/t@3", {"f1": 0.5})
    registry.delete("m", 3, reason="a mistake")
    read = Registry(registry.uri)
    entry = read.version("m", 2)

    assert (entry.tags, entry.note, entry.protected) == ({"owner": "me"}, "slow", True)
    assert entry.measured == {"lake/t@3": {"f1": 0.5}}
    assert read.history("m")[-1].reason == "a mistake"
    with pytest.raises(RegistryError, match=r"no version 3; it has: \[1, 2\]"):
        read.version("m", 3)
    assert put(registry).version == 4
    with pytest.raises(RegistryError, match="protected"):
        registry.delete("m", 2)
    registry.describe("m", 2, protected=False)
    before = read.history("m")[-1].time
    registry.delete("m", 2)
    assert sorted(read.state("m").versions) == [1, 4]
    assert sorted(read.at("m", before).versions) == [1, 2, 4]


def test_wrong_descriptions_are_refused_before_anything_is_written(registry):
    put(registry)
    for tags in ({"": "x"}, {"a": 1}, {"a": "x" * 1001}):
        with pytest.raises(ValueError, match="must have a name and a text"):
            registry.describe("m", 1, tags=tags)
        with pytest.raises(ValueError, match="must have a name and a text"):
            put(registry, tags=tags)
    with pytest.raises(ValueError, match="nothing to change of 'm'"):
        registry.describe("m", 1)
    with pytest.raises(ValueError, match="must be an address with a version"):
        registry.measure("m", 1, "lake/t", {"f1": 0.5})
    with pytest.raises(ValueError, match="metric 'f1' must be a finite"):
        registry.measure("m", 1, "lake/t@1", {"f1": float("nan")})
    assert DeltaTable(registry.uri).version() == 1


UNRELATED = {
    "register": lambda registry: put(registry),
    "alias": lambda registry: registry.alias("m", "challenger", 1),
    "tag": lambda registry: registry.describe("m", 1, tags={"owner": "me"}),
    "measure": lambda registry: registry.measure("m", 1, "t@1", {"f1": 0.5}),
    "delete": lambda registry: registry.delete("m", put(registry).version),
}


@pytest.mark.parametrize("unrelated", UNRELATED)
def test_what_does_not_move_the_pointer_undoes_no_move(registry, unrelated):
    for _ in range(2):
        put(registry)
    meanwhile = UNRELATED[unrelated]
    seq = registry.promote("m", 1, expect=2).pointer.seq
    meanwhile(registry)
    seq = registry.promote("m", 2, expect=seq).pointer.seq
    meanwhile(registry)
    back = registry.rollback("m", expect=seq, reason="broken").pointer
    assert (back.champion, back.previous) == (1, None)
    with pytest.raises(ConflictError, match=rf"not at event {seq} .* \(rolled_back\) came since"):
        registry.promote("m", 2, expect=seq)
    with pytest.raises(ConflictError, match="not at event 99"):
        registry.promote("m", 2, expect=99)


def test_an_unrelated_event_in_the_very_moment_costs_no_promotion(registry, monkeypatch):
    put(registry)
    put(registry)
    rival = Registry(registry.uri)
    write = registry._write

    def late(opened, chosen):
        monkeypatch.setattr(registry, "_write", write)
        put(rival)
        write(opened, chosen)

    monkeypatch.setattr(registry, "_write", late)
    assert registry.promote("m", 1, expect=2).pointer == Pointer(champion=1, seq=4)


def test_an_alias_is_moved_on_the_state_that_was_read(registry):
    for _ in range(2):
        put(registry)
    seen = registry.state("m").pointer.seq
    registry.alias("m", "best", 1, expect=seen)
    registry.alias("m", "other", 2, expect=seen)
    with pytest.raises(ConflictError, match=r"event 3 \(aliased\) came since"):
        registry.alias("m", "best", 2, expect=seen)
    with pytest.raises(ConflictError, match=r"event 3 \(aliased\) came since"):
        registry.unalias("m", "best", expect=seen)
    seen = registry.state("m").pointer.seq
    registry.promote("m", 1, expect=seen)
    with pytest.raises(ConflictError, match=r"event 5 \(promoted\) came since"):
        registry.alias("m", "best", 2, expect=seen)
    with pytest.raises(ConflictError, match="came since"):
        registry.describe("m", 1, note="x", expect=seen)


def test_what_an_alias_meant_at_a_time(registry, monkeypatch):
    def at_second(number):
        monkeypatch.setattr(log, "now", lambda: START + timedelta(seconds=number))

    for number in range(3):
        at_second(number)
        put(registry)
    moves = {
        10: ("best", 1),
        20: ("best", 2),
        25: ("other", 3),
        30: ("best", None),
        40: ("best", 3),
    }
    for second, (alias, version) in moves.items():
        at_second(second)
        if version is None:
            registry.unalias("m", alias)
        else:
            registry.alias("m", alias, version)
    read = Registry(registry.uri)
    seen = {
        s: read.at("m", START + timedelta(seconds=s)).aliases for s in (9, 10, 19.9, 29, 30, 41)
    }

    assert seen == {
        9: {},
        10: {"best": 1},
        19.9: {"best": 1},
        29: {"best": 2, "other": 3},
        30: {"other": 3},
        41: {"best": 3, "other": 3},
    }
    assert read.version("m", "best").version == 3
