"""Which files cannot hold a matching row, from the log's statistics alone. Pure.

A condition is judged for all files at once in three-valued logic: for each file, may some row make
it true, false, or null? Every doubt answers "may" (missing or truncated statistics, NaN, types
whose statistics writers round), so a file that could match is never skipped. Bounds are compared
by the same Arrow expressions that filter rows: implicit casts are then the same, and monotone.
Statistics: Delta protocol, section "Per-file Statistics".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute

from lepton.lake.constants import constant_of, is_constant

pc: Any = pyarrow.compute  # its stubs know no arrays of unknown type
Mask: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]

TRUNCATED = 32
"""Writers cut strings at this many characters (Spark) or later: a longest value is no bound."""
DIGITS = 15
"""Decimals of more digits may have gone through a double on their way into the log."""
MILLISECOND = 1000
"""Timestamps are cut to milliseconds; they are stored in microseconds."""
_FLIPPED = {"lt": "gt", "lte": "gte", "gt": "lt", "gte": "lte", "eq": "eq", "neq": "neq"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """What is known of one column, one entry a file.

    Attributes:
        low: no value is smaller; null where unknown.
        high: no value is larger; null where unknown.
        nulls: a null may be there.
        values: a value that is not null may be there.
    """

    low: Any
    high: Any
    nulls: Mask
    values: Mask


@dataclass(frozen=True, slots=True)
class Truth:
    """For each file, whether some row may make a condition true, false, or null."""

    true: Mask
    false: Mask
    null: Mask

    def __invert__(self) -> Truth:
        return Truth(self.false, self.true, self.null)

    def __and__(self, other: Truth) -> Truth:
        return Truth(
            self.true & other.true,
            self.false | other.false,
            (self.null & (other.null | other.true)) | (other.null & self.true),
        )

    def __or__(self, other: Truth) -> Truth:
        return ~(~self & ~other)


def exact(values: Any) -> Bounds:
    """Return the bounds of a partition column: one known value a file."""
    nulls = _mask(pc.is_null(values))
    return Bounds(low=values, high=values, nulls=nulls, values=~nulls)


def from_statistics(
    low: Any, high: Any, null_count: Any, rows: Any, *, widened: bool = False
) -> Bounds:
    """Return the bounds that statistics of a leaf column prove.

    Args:
        low: least values, typed as the column; null where the log does not tell.
        high: greatest values likewise.
        null_count: int64, null where unknown; None where it must not be relied on (nested).
        rows: int64 stored rows, null where unknown.
        widened: the table's columns may have had narrower types.
    """
    count = len(rows)
    some = np.ones(count, bool)
    if null_count is not None:
        some = ~_mask(pc.equal(null_count, 0))
    values = np.ones(count, bool)
    if null_count is not None:
        values = ~_mask(pc.equal(null_count, rows))
    kind: Any = low.type
    trusted = not (pa.types.is_float64(kind) and widened) and not (
        pa.types.is_decimal(kind) and kind.precision > DIGITS
    )
    if not trusted:
        low = high = pa.nulls(count, kind)
    elif pa.types.is_string(kind):
        long = pc.greater_equal(pc.utf8_length(high), TRUNCATED)
        high = pc.if_else(long, pa.scalar(None, kind), high)
    elif pa.types.is_timestamp(kind):
        low, high = _slack(low, -MILLISECOND), _slack(high, MILLISECOND)
    return Bounds(low=low, high=high, nulls=some, values=values)


def _slack(values: Any, micros: int) -> Any:
    """Shift timestamps; those near the ends of the range become unknown."""
    whole: Any = values.cast(pa.int64())
    safe = pc.less(pc.abs(pc.max_element_wise(whole, -(2**62))), 2**62)
    shifted = pc.add(pc.if_else(safe, whole, pa.scalar(None, pa.int64())), micros)
    return shifted.cast(values.type)


def judge(node: Any, columns: Mapping[str, Bounds], files: int) -> Truth:
    """Judge a parsed SQL condition (sqlglot) for every file.

    Args:
        node: the condition.
        columns: bounds by column name, nested ones by names joined by NUL; absent means unknown.
        files: number of files.
    """
    from sqlglot import exp

    if isinstance(node, exp.Paren):
        return judge(node.this, columns, files)
    if isinstance(node, exp.Not):
        return ~judge(node.this, columns, files)
    if isinstance(node, exp.And):
        return judge(node.this, columns, files) & judge(node.expression, columns, files)
    if isinstance(node, exp.Or):
        return judge(node.this, columns, files) | judge(node.expression, columns, files)
    found = _leaf(node, columns, files)
    return found if found is not None else _unknown(files)


def _leaf(node: Any, columns: Mapping[str, Bounds], files: int) -> Truth | None:
    from sqlglot import exp

    if isinstance(node, exp.EQ | exp.NEQ | exp.LT | exp.LTE | exp.GT | exp.GTE):
        return _comparison(node, columns)
    bounds = _bounds(node.this, columns)
    if bounds is None:
        return None
    if isinstance(node, exp.Is) and isinstance(node.expression, exp.Null):
        return Truth(bounds.nulls, bounds.values, np.zeros(files, bool))
    if isinstance(node, exp.In) and node.expressions:
        return _membership(bounds, [_constant(v, bounds) for v in node.expressions])
    if isinstance(node, exp.Between) and is_constant(node.args["low"], node.args["high"]):
        return _compare("gte", bounds, _constant(node.args["low"], bounds)) & _compare(
            "lte", bounds, _constant(node.args["high"], bounds)
        )
    return None


def _comparison(node: Any, columns: Mapping[str, Bounds]) -> Truth | None:
    operator, left, right = node.key, node.this, node.expression
    if is_constant(left):
        operator, left, right = _FLIPPED[operator], right, left
    bounds = _bounds(left, columns)
    if bounds is None or not is_constant(right):
        return None
    return _compare(operator, bounds, _constant(right, bounds))


def _constant(node: Any, bounds: Bounds) -> Any:
    return constant_of(node, bounds.low.type)


def _compare(operator: str, bounds: Bounds, value: Any) -> Truth:
    low, high, x = pc.field("low"), pc.field("high"), pc.scalar(value)
    may: dict[str, tuple[Any, Any]] = {
        "lt": (low < x, high >= x),
        "lte": (low <= x, high > x),
        "gt": (high > x, low <= x),
        "gte": (high >= x, low < x),
        "eq": ((low <= x) & (high >= x), (low != x) | (high != x)),
    }
    if operator == "neq":
        return ~_compare("eq", bounds, value)
    true, false = (_evaluate(e, bounds) for e in may[operator])
    if pa.types.is_floating(bounds.low.type) or value != value:
        false = np.ones(len(false), bool)  # a NaN is there for all we know: no comparison holds
    return Truth(true & bounds.values, false & bounds.values, bounds.nulls)


def _membership(bounds: Bounds, values: Sequence[Any]) -> Truth:
    """IN is what its equalities say."""
    verdict = _compare("eq", bounds, values[0])
    for value in values[1:]:
        verdict = verdict | _compare("eq", bounds, value)
    return verdict


def _evaluate(expression: Any, bounds: Bounds) -> Mask:
    """Where the expression holds or is not known; NaN bounds (no bounds at all) count as such."""
    from pyarrow.dataset import dataset

    low, high = bounds.low, bounds.high
    if pa.types.is_floating(low.type):
        low = pc.if_else(pc.is_nan(low), pa.scalar(None, low.type), low)
        high = pc.if_else(pc.is_nan(high), pa.scalar(None, high.type), high)
    table: Any = pa.table({"low": low, "high": high})
    make: Any = dataset
    try:
        answer: Any = make(table).to_table(columns={"may": expression})["may"]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):
        return np.ones(len(table), bool)
    return _mask(pc.fill_null(answer, True))


def _bounds(node: Any, columns: Mapping[str, Bounds]) -> Bounds | None:
    from sqlglot import exp

    if not isinstance(node, exp.Column):
        return None
    return columns.get("\0".join(str(part.name) for part in node.parts))


def _unknown(files: int) -> Truth:
    yes = np.ones(files, bool)
    return Truth(yes, yes, yes)


def _mask(values: Any) -> Mask:
    """A boolean Arrow array as numpy; null counts as False."""
    filled: Any = pc.fill_null(values, False)
    return np.asarray(filled.to_numpy(zero_copy_only=False), bool)
