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

import lepton
from lepton.errors import StreamError
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
