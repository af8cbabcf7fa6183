"""Mixtures: exact ratio, any world size, resumable."""

import json
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lepton
from lepton.errors import StreamError
from lepton.lake import Snapshot
from lepton.stream import Mixture, mix
from lepton.stream.mixture import STREAM_BITS


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    lake = tmp_path_factory.mktemp("lake")
    old = lepton.write(pa.table({"id": np.arange(500), "kind": ["old"] * 500}), lake / "old")
    new = lepton.write(pa.table({"id": np.arange(70), "kind": ["new"] * 70}), lake / "new")
    return mix(old.stream(batch_size=30, epochs=2, lanes=4), new.stream(batch_size=10, lanes=4))


def steps(mixture: Mixture, n: int, state: Any = None) -> list[list[tuple[str, int]]]:
    ranks = [list(mixture.shard(r, n, state, format="arrow")) for r in range(n)]
    return [
        sorted(zip(rows["kind"].to_pylist(), rows["id"].to_pylist(), strict=True))
        for rows in (pa.concat_tables(step) for step in zip(*ranks, strict=True))
    ]


def test_every_batch_has_its_share_of_each_stream(mixture: Mixture) -> None:
    found = steps(mixture, 1)
    kinds = [[kind for kind, _ in step] for step in found]

    assert len(found) == mixture.steps == 34
    for number, step in enumerate(kinds):
        old, new = (20, 7) if number % 17 == 16 else (30, 10)  # 20 of 30 rows, and as much of 10
        assert (step.count("old"), step.count("new")) == (old, new)
    old = [i for step in found for kind, i in step if kind == "old"]
    new = [i for step in found for kind, i in step if kind == "new"]
    assert sorted(old) == sorted([*range(500)] * 2)
    assert sorted(new[:70]) == sorted(new[70:140]) == list(range(70))
    assert new[:70] != new[70:140]


def test_a_mixture_is_the_same_at_any_world_size_and_resumes(mixture: Mixture) -> None:
    whole = steps(mixture, 1)
    shard = mixture.shard(1, 2)
    parts = [shard.next_part() for _ in range(21)]
    state = shard.state_dict()

    assert steps(mixture, 3) == steps(mixture, 4) == whole
    assert steps(mixture, 3, state) == whole[21:]
    assert state == _after(mixture, 21)
    assert len(set(parts[0].ids.tolist())) == parts[0].delivered == len(parts[0].batch["id"])


def _after(mixture: Mixture, count: int) -> dict[str, Any]:
    shard = mixture.shard(0, 4)
    for _ in range(count):
        next(shard)
    return shard.state_dict()


def test_what_cannot_be_mixed_is_refused(mixture: Mixture, tmp_path: Path) -> None:
    other = lepton.write(pa.table({"id": np.arange(9.0)}), tmp_path / "t").stream(batch_size=4)
    one = mixture.streams[0]

    with pytest.raises(ValueError, match="two streams or more"):
        mix(one)
    with pytest.raises(StreamError, match=r"columns are id int64, kind string and id double"):
        mix(one, other)
    with pytest.raises(StreamError, match="another mixture"):
        mixture.shard(0, 1, one.shard(0, 1).state_dict())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Snapshot, Snapshot]:
    lake = tmp_path_factory.mktemp("pair")
    made: list[Snapshot] = []
    for kind in ("old", "new"):
        for first, last in ((0, 17), (17, 60)):
            rows = {"id": np.arange(first, last), "kind": [kind] * (last - first)}
            lepton.write(pa.table(rows), lake / kind)
        made.append(lepton.table(lake / kind))
    return made[0], made[1]


def few(rows: Snapshot, count: int) -> Snapshot:
    return rows.where(f"id < {count}")


@given(
    sizes=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    batches=st.tuples(st.integers(2, 12), st.integers(2, 12)),
    lanes=st.integers(1, 2),
    drops=st.booleans(),
    data=st.data(),
)
@settings(max_examples=15)
def test_the_ratio_is_exact_and_every_row_comes_once_an_epoch(
    pair: tuple[Snapshot, Snapshot],
    sizes: tuple[int, int],
    batches: tuple[int, int],
    lanes: int,
    drops: bool,
    data: st.DataObject,
) -> None:
    transform = (lambda t: t.filter(pc.field("id") != 3)) if drops else None
    first, second = (
        few(rows, size).stream(batch_size=batch, lanes=lanes, epochs=2, transform=transform)
        for rows, size, batch in zip(pair, sizes, batches, strict=True)
    )
    mixture = mix(first, second)
    shard = mixture.shard(0, 1)
    states, seen, ids = [shard.state_dict()], [list[int](), list[int]()], list[int]()
    for number in range(mixture.steps):
        part = shard.next_part()
        old = min(batches[0], sizes[0] - number % first.order(0).steps * batches[0])
        counts = [int((part.ids >> STREAM_BITS == k).sum()) for k in (0, 1)]
        assert counts == [old, round(Fraction(old * batches[1], batches[0]) + Fraction(1, 10**6))]
        assert part.global_rows == sum(counts)
        for k in (0, 1):
            seen[k] += part.ids[part.ids >> STREAM_BITS == k].tolist()
        ids += part.rows["id"].to_pylist()
        states.append(shard.state_dict())

    for size, found in zip(sizes, seen, strict=True):
        for i in range(0, len(found), size):
            assert len(set(found[i : i + size])) == min(size, len(found) - i)
    assert not drops or 3 not in ids
    cut = data.draw(st.integers(0, mixture.steps), label="cut")
    whole = steps(mixture, 1)
    assert sorted(ids) == sorted(i for step in whole for _, i in step)
    assert steps(mixture, lanes, states[cut]) == whole[cut:]
    assert states[cut] == mixture.state_at(*divmod(cut, first.order(0).steps))


def test_a_mixture_resumes_at_each_batch(pair: tuple[Snapshot, Snapshot]) -> None:
    mixture = mix(
        few(pair[0], 41).stream(batch_size=12, lanes=3, epochs=2),
        few(pair[1], 25).stream(batch_size=10, lanes=4, seed=2),
        pair[1].stream(batch_size=7, lanes=3),
    )
    whole = steps(mixture, 1)
    two = [mixture.shard(r, 2) for r in range(2)]
    for cut in range(mixture.steps):
        states = [shard.state_dict() for shard in two]
        assert states[0] == states[1]
        assert steps(mixture, 1 + cut % 3, json.dumps(states[0])) == whole[cut:]
        for shard in two:
            next(shard)
    assert [len(step) for step in whole[:3]] == [29, 29, 29]


def test_a_mixture_loses_nothing_by_an_error(pair: tuple[Snapshot, Snapshot]) -> None:
    tries: list[int] = []

    def moody(rows: pa.Table) -> list[tuple[str, int]]:
        tries.append(len(rows))
        if len(tries) in (1, 3):
            raise ZeroDivisionError
        return sorted(zip(rows["kind"].to_pylist(), rows["id"].to_pylist(), strict=True))

    mixture = mix(pair[0].stream(batch_size=20), few(pair[1], 25).stream(batch_size=10))
    shard = mixture.shard(0, 1, format=moody)
    seen: list[Any] = []
    while len(shard):
        with suppress(ZeroDivisionError):
            seen.append(next(shard))

    assert seen == steps(mixture, 1)
    assert list(shard) == []


def test_a_stream_of_a_mixture_that_fails_holds_the_others_back(
    pair: tuple[Snapshot, Snapshot], tmp_path: Path
) -> None:
    broken = lepton.write(pair[1].to_arrow(), tmp_path / "t")
    mixture = mix(pair[0].stream(batch_size=20), broken.stream(batch_size=10))
    shard = mixture.shard(0, 1, format="arrow")
    file = tmp_path / "t" / broken.files()[0].path
    away = file.rename(tmp_path / "away")

    for _ in range(2):
        with pytest.raises(StreamError, match=r"nothing is lost.*\[cursor: .*'streams': \["):
            next(shard)
        assert [s["rows"] for s in shard.state_dict()["streams"]] == [0, 0]
    away.rename(file)
    rows = pa.concat_tables(list(shard))
    assert sorted(rows.filter(pc.field("kind") == "old")["id"].to_pylist()) == list(range(60))
