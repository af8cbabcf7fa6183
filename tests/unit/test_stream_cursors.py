"""Whose cursor is it: filters, versions and threads; and what a reader does after an error."""

import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import write_deltalake

import lepton
from lepton.errors import LakeError, StreamError
from lepton.lake import Snapshot
from lepton.lake.predicate import text_of
from lepton.stream import Cursor, Shard, Stream


@pytest.fixture
def table(tmp_path: Path) -> Snapshot:
    return lepton.write(pa.table({"id": np.arange(50)}), tmp_path / "t")


def is_in(values: list[int]) -> Any:
    return pc.field("id").isin(values)


def test_filters_that_print_alike_have_orders_of_their_own(table: Snapshot) -> None:
    one, other = is_in([*range(40)]), is_in([*range(20), 45, *range(21, 40)])
    first, second = (table.where(f).stream(batch_size=10) for f in (one, other))
    long = [pc.field("id").cast(pa.string()).isin([f"{'x' * 200}{i}"]) for i in range(2)]

    assert str(one) == str(other)
    assert first.fingerprint != second.fingerprint
    assert first.fingerprint == pickle.loads(pickle.dumps(first)).fingerprint
    assert text_of(long[0]) != text_of(long[1])
    with pytest.raises(StreamError, match="another order"):
        second.shard(0, 1, first.shard(0, 1).state_dict())


def test_the_fingerprint_of_a_short_filter_never_changes(table: Snapshot) -> None:
    """Frozen: a cursor of an earlier lepton must be known again."""
    assert text_of(pc.field("id") > 3) == "(id > 3)"
    assert text_of(is_in([1, 2])) == str(is_in([1, 2]))


def ids_of(shard: Shard) -> Iterator[int]:
    for batch in shard:
        yield from batch["id"].to_pylist()


def test_a_pinned_stream_takes_no_other_version(table: Snapshot) -> None:
    old = table.stream(batch_size=10, epochs=3, follow=True).shard(0, 1)
    next(old)
    state = old.state_dict()
    newer = lepton.write(pa.table({"id": np.arange(50, 90)}), table.uri)
    pinned = newer.stream(batch_size=10, epochs=3)
    match = r"of version 0, and the stream is pinned to .*@1: resume with .*version=0"

    with pytest.raises(StreamError, match=match):
        pinned.shard(0, 1, state)
    with pytest.raises(StreamError, match=match):
        pinned.shard(0, 1).load_state_dict(state)
    assert table.stream(batch_size=10, epochs=3).shard(0, 1, state).state_dict()["rows"] == 10


def test_no_row_is_lost_when_a_followed_table_cannot_be_asked(
    table: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = table.stream(batch_size=10, epochs=2, follow=True).shard(0, 1, format="arrow")
    asked = Stream.newest
    monkeypatch.setattr(Stream, "newest", lambda self: _raised(LakeError("no answer")))
    seen: list[int] = []

    with pytest.raises(StreamError, match=r"no answer \[cursor: .*'epoch': 1, 'rows': 0"):
        seen.extend(ids_of(shard))
    assert sorted(seen) == list(range(50))
    assert len(shard) == 5
    monkeypatch.setattr(Stream, "newest", asked)
    assert sorted(ids_of(shard)) == list(range(50))
    assert len(shard) == 0


def test_a_followed_table_without_the_columns_stops_the_stream_again_and_again(
    table: Snapshot,
) -> None:
    shard = table.stream(batch_size=50, epochs=2, follow=True).shard(0, 1, format="arrow")
    next(shard)
    other = pa.table({"other": np.arange(9)})
    write_deltalake(table.uri, other, mode="overwrite", schema_mode="overwrite")

    for _ in range(2):
        with pytest.raises(StreamError, match=r"no column id.*cursor: .*'epoch': 1, 'rows': 0"):
            next(shard)
    assert shard.state_dict()["version"] == 0


def _raised(error: Exception) -> int:
    raise error


def test_after_an_error_reading_begins_again_at_the_cursor(table: Snapshot) -> None:
    file = Path(table.uri, table.files()[0].path)
    away = file.rename(file.with_suffix(".away"))
    shard = table.stream(batch_size=10).shard(0, 1, format="arrow")

    for _ in range(2):
        with pytest.raises(StreamError, match="'rows': 0"):
            next(shard)
    assert len(shard) == 5
    away.rename(file)
    assert sorted(ids_of(shard)) == list(range(50))


def test_a_batch_that_could_not_be_made_comes_again(table: Snapshot) -> None:
    tries: list[int] = []

    def moody(rows: pa.Table) -> list[int]:
        tries.append(len(rows))
        if len(tries) in (1, 4):
            raise ZeroDivisionError
        return rows["id"].to_pylist()

    seen: list[int] = []
    shard = table.stream(batch_size=10).shard(0, 1, format=moody)
    while len(shard):
        try:
            seen += next(shard)
        except ZeroDivisionError:
            assert shard.state_dict()["rows"] == len(seen)

    assert sorted(seen) == list(range(50))
    assert list(shard) == []


def test_a_transform_that_fails_once_loses_no_rows(table: Snapshot) -> None:
    failures = iter([True])

    def transform(rows: pa.Table) -> pa.Table:
        if len(rows) and next(failures, False):
            raise ZeroDivisionError
        return rows

    shard = table.stream(batch_size=10, transform=transform).shard(0, 1, format="arrow")
    with pytest.raises(ZeroDivisionError):
        next(shard)

    assert sorted(ids_of(shard)) == list(range(50))


def test_orders_are_asked_for_by_many_threads(table: Snapshot) -> None:
    stream = table.stream(batch_size=10, epochs=10_000)
    wrong: list[BaseException] = []

    def ask(first: int) -> None:
        try:
            for i in range(3000):
                epoch = (first * 31 + i) % 10_000
                assert stream.order(epoch).epoch == epoch
        except BaseException as e:  # noqa: BLE001 - it is looked at below
            wrong.append(e)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []
    assert len(stream._cache["orders"]) <= 2


def test_a_followed_version_is_kept_from_the_first_batch_on(table: Snapshot) -> None:
    """A state of the first epoch names its version, so that a newer table resumes it there."""
    shard = table.stream(batch_size=10, epochs=2, follow=True).shard(0, 1, format="arrow")
    seen = next(shard)["id"].to_pylist()
    state: Any = shard.state_dict()
    newer = lepton.write(pa.table({"id": np.arange(50, 90)}), table.uri)
    again = newer.stream(batch_size=10, epochs=2, follow=True).shard(0, 1, state, format="arrow")
    first = [again.next_part().rows["id"].to_pylist() for _ in range(4)]

    assert sorted(seen + [i for ids in first for i in ids]) == list(range(50))
    assert state["version"] == 0
    assert sorted(ids_of(again)) == list(range(90))
    with pytest.raises(StreamError, match="lies beyond"):
        newer.stream(batch_size=10).shard(0, 1, Cursor(0, 90))
