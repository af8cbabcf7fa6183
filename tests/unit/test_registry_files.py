"""The registry's files: one an event, and few of them for whoever opens the log."""

from dataclasses import replace
from itertools import cycle

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from lepton.errors import ConflictError, LakeError
from lepton.registry import Registry, log
from lepton.registry.rows import SCHEMA, row_of


@pytest.fixture
def registry(tmp_path):
    made = Registry(str(tmp_path / "registry"))
    for _ in range(2):
        made.register("m", checkpoint="c", manifest_sha256="s")
    return made


def move(registry, times):
    """Make one of two versions the champion, in turn."""
    now = registry.state("m").pointer.champion
    for _, version in zip(range(times), cycle([2, 1] if now == 1 else [1, 2]), strict=False):
        registry.promote("m", version, expect=None)


def fill(registry):
    """Make the move after which the next one finds too many files."""
    move(registry, log.MOST_FILES - 2)
    assert registry.state("m").pointer.seq == log.MOST_FILES == files_of(registry)


def files_of(registry):
    return len(DeltaTable(registry.uri).file_uris())


def seqs_of(registry):
    return [e.seq for e in Registry(registry.uri).history("m")]


def test_a_long_history_is_in_few_files(registry, tmp_path):
    watching, events = Registry(registry.uri), 2 * log.MOST_FILES + 10
    for seq in range(3, events + 1):
        move(registry, 1)
        assert watching.state("m").pointer.seq == seq
        assert files_of(registry) <= log.MOST_FILES + 1
    assert list(tmp_path.glob("registry/_delta_log/*.checkpoint.parquet"))
    seqs = list(range(1, events + 1))
    for known in (registry, watching):
        assert [e.seq for e in known.history("m")] == seqs == seqs_of(registry)
        assert known.state("m") == Registry(registry.uri).state("m")
    rows = DeltaTable(registry.uri).to_pyarrow_table()
    assert sorted(rows["seq"].to_pylist()) == seqs


def test_rows_are_kept_to_the_letter(registry):
    fill(registry)
    first = registry.history("m")[0]
    row = row_of(replace(first, model="n", registered=replace(first.registered, model="n")))
    row["payload"] = row["payload"].replace("{", '{"of a later lepton": 1, ', 1)
    rows = pa.Table.from_pylist([row], schema=SCHEMA)
    write_deltalake(registry.uri, rows, mode="append")
    before = DeltaTable(registry.uri).to_pyarrow_table().to_pylist()
    move(Registry(registry.uri), 1)
    assert files_of(registry) == 2
    after = DeltaTable(registry.uri).to_pyarrow_table().to_pylist()
    assert row in before
    assert [r for r in before if r not in after] == []
    assert len(after) == len(before) + 1


def test_a_move_does_not_depend_on_it(registry, monkeypatch, caplog):
    fill(registry)

    def fail(*_, **__):
        raise LakeError("no room")

    monkeypatch.setattr(log, "commit_anew", fail)
    move(registry, 2)
    assert files_of(registry) == log.MOST_FILES + 2 == len(seqs_of(registry))
    assert "stays in many files, slow to open: no room" in caplog.text


@pytest.mark.parametrize("before", [True, False])
def test_who_moves_the_model_meanwhile_is_still_seen(registry, monkeypatch, before):
    fill(registry)
    other, inner, seen = Registry(registry.uri), log.commit_anew, registry.state("m")

    def meanwhile(*args, **kwargs):
        if before:
            other.alias("m", "best", 1, expect=seen.pointer.seq)
        done = inner(*args, **kwargs)
        if not before:
            other.alias("m", "best", 1, expect=seen.pointer.seq)
        return done

    monkeypatch.setattr(other, "_put_together", lambda _: None)
    monkeypatch.setattr(log, "commit_anew", meanwhile)
    with pytest.raises(ConflictError):
        registry.alias("m", "best", 2, expect=seen.pointer.seq)
    assert Registry(registry.uri).version("m", "best").version == 1
    assert seqs_of(registry) == list(range(1, seen.pointer.seq + 2))


def test_of_two_who_put_together_one_does(registry):
    fill(registry)
    first, second = Registry(registry.uri), Registry(registry.uri)
    for one in (first, second):
        one.state("m")
    for one, alias in ((first, "a"), (second, "b")):
        one._put_together(one._table)
        one.alias("m", alias, 1)
    assert seqs_of(registry) == list(range(1, log.MOST_FILES + 3))
