"""The row order as a pure function."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton.errors import StreamError
from lepton.stream.cursor import Cursor, cursor_of
from lepton.stream.layout import FileRows, fine_rows, layout_of
from lepton.stream.order import (
    Digest,
    Layout,
    Order,
    digest_of,
    lanes_of,
    permutation,
    words_for,
)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    files: list[FileRows] = []
    for index in range(draw(st.integers(1, 5))):
        groups = np.array(draw(st.lists(st.integers(0, 40), max_size=4)), np.int64)
        stored = int(groups.sum())
        live = np.flatnonzero(np.arange(stored) % draw(st.integers(2, 4)) != 0)
        files.append(FileRows(index, stored, live if draw(st.booleans()) else None, groups))
    return layout_of(
        files,
        draw(st.integers(1, 50)),
        fine=draw(st.booleans()),
        window_rows=draw(st.integers(1, 120)),
    )


@st.composite
def orders(draw: st.DrawFn) -> Order:
    lanes = draw(st.integers(1, 6))
    return Order(
        layout=draw(layouts().filter(lambda layout: layout.rows > 0)),
        epoch=draw(st.integers(0, 3)),
        batch_size=draw(st.integers(lanes, 40)),
        lanes=lanes,
        seed=draw(st.integers(0, 2**40)),
        version=draw(st.integers(0, 9)),
        shuffle=draw(st.booleans()),
    )


def delivered(order: Order, lanes: range, rows: int = 0) -> list[tuple[int, int, int]]:
    """(slot, chunk, live row of the chunk) of every row, in the order in which units come."""
    found: list[tuple[int, int, int]] = []
    for unit in order.units(lanes, rows):
        slots = order.slots(unit.lane, unit.offset, unit.rows)
        pieces = order.window_pieces(unit.lane, unit.window)
        laid_out = [(p.chunk, row) for p in pieces for row in range(p.low, p.high)]
        index = order.window_rows(unit.lane, unit.window)[unit.low : unit.high]
        found += [(int(s), *laid_out[i]) for s, i in zip(slots, index, strict=True)]
    return found


@given(layouts())
def test_chunks_cover_every_live_row_once_and_keep_to_their_file(layout: Layout) -> None:
    assert (layout.live > 0).all()
    assert (layout.stop - layout.start >= layout.live).all()
    assert (np.diff(layout.block) >= 0).all()
    same = np.diff(layout.file) == 0
    assert (layout.stop[:-1][same] <= layout.start[1:][same]).all()


def test_chunks_follow_row_groups_and_split_those_too_large() -> None:
    file = FileRows(0, 330, None, np.array([30, 30, 30, 160, 10, 70]))
    layout = layout_of([file], 64, fine=False, window_rows=64)

    assert list(zip(layout.start.tolist(), layout.stop.tolist(), strict=True)) == [
        (0, 60),
        (60, 90),
        (90, 144),
        (144, 198),
        (198, 250),
        (250, 260),
        (260, 330),
    ]
    assert layout.block.tolist() == [0, 1, 2, 2, 2, 3, 4]


def test_parts_of_a_row_group_stay_together_in_stored_order() -> None:
    files = [FileRows(i, 400, None, np.array([400])) for i in range(6)]
    layout = layout_of(files, 100, fine=False, window_rows=100)
    order = Order(layout=layout, epoch=0, batch_size=10, lanes=1)
    chunks = [order.window_pieces(0, w)[0].chunk for w in range(24)]

    assert sorted(chunks) == list(range(24))
    assert chunks != sorted(chunks)
    assert all(chunks[i] % 4 == i % 4 for i in range(24))


def test_small_tables_are_cut_finely_enough_for_every_lane() -> None:
    assert fine_rows(1438, 8) == 16
    assert fine_rows(1_000_000, 8) == 3907


@pytest.mark.parametrize("count", [0, 1, 2, 3, 1000, 65_536, 65_537, 262_144, 262_145, 300_000])
def test_a_permutation_holds_every_item_once(count: int) -> None:
    words = np.random.Philox(key=[7, 9]).random_raw(words_for(count))
    found = permutation(words, count)

    assert found.dtype == np.int64
    assert (np.sort(found) == np.arange(count)).all()


def test_permutations_take_every_pair_either_way_round_and_move_rows_anywhere() -> None:
    """300 permutations of 64 items: each pair's order and each item's place look uniform."""
    seen = np.stack(
        [
            np.argsort(permutation(np.random.Philox(key=[i, 1]).random_raw(words_for(64)), 64))
            for i in range(300)
        ]
    )
    before = (seen[:, :, None] < seen[:, None, :]).mean(0)[np.triu_indices(64, 1)]

    assert abs(before.mean() - 0.5) < 0.01
    assert before.min() > 0.32  # 6 sigma of a fair coin thrown 300 times
    assert before.max() < 0.68
    assert np.abs(seen.mean(0) - 31.5).max() < 6.5  # 6 sigma of a uniform place's mean


@given(orders())
def test_every_row_comes_once_and_every_slot_is_filled_once(order: Order) -> None:
    found = delivered(order, range(order.lanes))

    assert sorted(s for s, _, _ in found) == list(range(order.rows))
    assert len({(w, i) for _, w, i in found}) == order.rows
    assert order.steps == -(-order.rows // order.batch_size)


@given(orders(), st.integers(1, 6))
def test_any_number_of_ranks_gets_the_same_rows_at_the_same_slots(order: Order, n: int) -> None:
    whole = sorted(delivered(order, range(order.lanes)))
    ranks = [delivered(order, lanes_of(r, n, order.lanes)) for r in range(min(n, order.lanes))]

    assert sorted(row for rank in ranks for row in rank) == whole


@given(orders(), st.data())
def test_resuming_anywhere_gives_exactly_the_rest(order: Order, data: st.DataObject) -> None:
    rows = data.draw(st.integers(0, order.rows - 1))
    rest = delivered(order, range(order.lanes), rows)

    assert sorted(rest) == [r for r in sorted(delivered(order, range(order.lanes))) if r[0] >= rows]


@given(orders())
def test_units_come_in_the_order_in_which_steps_want_them(order: Order) -> None:
    needs = [unit.need for unit in order.units(range(order.lanes))]

    assert needs == sorted(needs)


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 2**50)), max_size=30), st.data())
def test_a_digest_adds_up_and_sees_places(
    pairs: list[tuple[int, int]], data: st.DataObject
) -> None:
    slots, rows = (np.array([p[i] for p in pairs], np.int64) for i in (0, 1))
    cut = data.draw(st.integers(0, len(pairs)))
    whole = digest_of(slots, rows)

    assert digest_of(slots[:cut], rows[:cut]) + digest_of(slots[cut:], rows[cut:]) == whole
    assert whole + Digest() == whole
    if len(set(rows.tolist())) > 1:
        assert (
            digest_of(np.arange(len(rows)), rows)
            != digest_of(np.arange(len(rows)), np.roll(np.sort(rows), 1))
            or rows.tolist() == np.roll(np.sort(rows), 1).tolist()
        )


def order_of(seed: int = 0, epoch: int = 0, version: int = 0) -> list[int]:
    order = Order(
        layout=layout_of([FileRows(0, 100)], 16, fine=True, window_rows=50),
        epoch=epoch,
        batch_size=10,
        lanes=2,
        seed=seed,
        version=version,
    )
    return [w * 16 + i for _, w, i in sorted(delivered(order, range(2)))]


def test_seed_epoch_and_version_each_give_another_order() -> None:
    same, other = order_of(), [order_of(seed=1), order_of(epoch=1), order_of(version=1)]

    assert same == order_of()
    assert len({tuple(o) for o in [same, *other]}) == 4


def test_the_order_of_a_small_epoch_never_changes() -> None:
    """Frozen: a change here means that no run of an earlier lepton can be resumed."""
    assert order_of()[:12] == [99, 31, 98, 19, 97, 15, 35, 65, 11, 44, 81, 20]


def test_a_plan_over_many_files_is_small_and_quick_to_search() -> None:
    files = 20_000
    described = (FileRows(i, 50_000) for i in range(files))
    layout = layout_of(described, 65_536, fine=False, window_rows=65_536)
    order = Order(layout=layout, epoch=0, batch_size=4096, lanes=8)

    assert layout.rows == 10**9
    assert len(layout.live) == files
    first = next(order.units(range(8), layout.rows - 1))
    assert first.epoch == 0


def test_a_cursor_survives_json_and_refuses_other_things() -> None:
    cursor = Cursor(1, 70, "abc")

    assert cursor_of(cursor.to_dict()) == cursor
    assert cursor.after(30, 100) == Cursor(2, 0, "abc")
    assert cursor.after(29, 100) == Cursor(1, 99, "abc")
    for wrong in ("no json", {}, {"v": 2, "epoch": -1, "rows": 0, "order": ""}, "[]"):
        with pytest.raises(StreamError):
            cursor_of(wrong)
    with pytest.raises(StreamError, match="version 3"):
        cursor_of({"v": 3, "epoch": 0, "rows": 0, "order": ""})
