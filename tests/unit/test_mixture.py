"""Mixtures: exact ratio, any world size, resumable."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import lepton
from lepton.errors import StreamError
from lepton.stream import Mixture, mix


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
        assert step.count("old") == (20 if number % 17 == 16 else 30)
        assert step.count("new") == 10
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
