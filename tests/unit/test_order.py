"""The row order as a pure function."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton.errors import StreamError
from lepton.stream.cursor import Cursor, cursor_of
from lepton.stream.order import Digest, Order, digest_of, lanes_of, layout_of


@st.composite
def orders(draw: st.DrawFn) -> Order:
    sizes = draw(st.lists(st.integers(0, 90), min_size=1, max_size=5).filter(any))
    files: dict[int, object] = {}
    for i, size in enumerate(sizes):
        some = draw(st.booleans())
        positions = np.flatnonzero(np.arange(size) % 3 != 0) if some else None
        files[i] = size if positions is None or not len(positions) else positions
    lanes = draw(st.integers(1, 6))
    layout = layout_of(files, dict(enumerate(sizes)), lanes)  # type: ignore[arg-type]
    return Order(
        layout=layout,
        epoch=draw(st.integers(0, 3)),
        batch_size=draw(st.integers(lanes, 40)),
        lanes=lanes,
        seed=draw(st.integers(0, 2**40)),
        version=draw(st.integers(0, 9)),
        shuffle=draw(st.booleans()),
    )


def delivered(order: Order, lanes: range, rows: int = 0) -> list[tuple[int, int, int]]:
    """(slot, window, index in window) of every row, in the order in which units come."""
    found: list[tuple[int, int, int]] = []
    for unit in order.units(lanes, rows):
        slots = order.slots(unit.lane, unit.offset, unit.rows)
        index = order.window_rows(unit.window)[unit.low : unit.high]
        found += [(int(s), unit.window, int(i)) for s, i in zip(slots, index, strict=True)]
    return found


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
        layout=layout_of({0: 100}, {0: 100}, 2),
        epoch=epoch,
        batch_size=10,
        lanes=2,
        seed=seed,
        version=version,
    )
    return [w * 1000 + i for _, w, i in sorted(delivered(order, range(2)))]


def test_seed_epoch_and_version_each_give_another_order() -> None:
    same, other = order_of(), [order_of(seed=1), order_of(epoch=1), order_of(version=1)]

    assert same == order_of()
    assert len({tuple(o) for o in [same, *other]}) == 4


def test_the_order_of_a_small_epoch_never_changes() -> None:
    """Frozen: a change here means that no run of an earlier lepton can be resumed."""
    assert order_of()[:12] == [32, 8, 14, 7, 60, 58, 26, 36, 53, 47, 57, 15]


def test_a_plan_over_many_files_is_small_and_quick_to_search() -> None:
    files = 20_000
    layout = layout_of(dict.fromkeys(range(files), 50_000), dict.fromkeys(range(files), 50_000), 8)
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
    for wrong in ("no json", {}, {"v": 1, "epoch": -1, "rows": 0, "order": ""}, "[]"):
        with pytest.raises(StreamError):
            cursor_of(wrong)
    with pytest.raises(StreamError, match="version 2"):
        cursor_of({"v": 2, "epoch": 0, "rows": 0, "order": ""})
