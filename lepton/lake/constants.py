"""Constants of row filters: what a literal means beside the column that it is compared with. Pure.

A number beside a decimal is a decimal, and beside an integer it is never rounded, however large or
long; text beside a date or a time is one too; beside an instant a time without a zone is in UTC.
"""

from __future__ import annotations

import datetime as dt
import re
from decimal import ROUND_FLOOR, Context, Decimal
from typing import Any

import pyarrow as pa

from lepton.errors import LakeError

_BEYOND = Decimal(2**64)  # no integer column reaches it
_HALF = Decimal("0.5")
_EXACT = Context(prec=400)


def is_constant(*nodes: Any) -> bool:
    """Whether parsed SQL nodes are constants that :func:`constant_of` may know."""
    from sqlglot import exp

    return all(isinstance(n, exp.Literal | exp.Neg | exp.Boolean | exp.Cast) for n in nodes)


def constant_of(node: Any, kind: pa.DataType | None = None) -> Any:
    """Return the Python value of a parsed SQL constant.

    Args:
        node: the constant.
        kind: the type that it is compared with, where known.

    Raises:
        LakeError: it is no constant, or one that the column cannot be compared with exactly.
    """
    from sqlglot import exp

    if isinstance(node, exp.Neg) and isinstance(node.this, exp.Literal):
        if not node.this.is_string:
            return _number(f"-{node.this.this}", kind)
    elif isinstance(node, exp.Boolean):
        return bool(node.this)
    elif isinstance(node, exp.Cast) and isinstance(node.this, exp.Literal):
        wanted = node.to.sql().upper()
        if wanted == "DATE" or wanted.startswith("TIMESTAMP"):
            return _time(str(node.this.this), kind, day=wanted == "DATE")
    elif isinstance(node, exp.Literal):
        return _literal(str(node.this), kind, quoted=bool(node.is_string))
    raise LakeError(f"the filter needs a constant where it has {node.sql()!r}")


def _literal(text: str, kind: pa.DataType | None, *, quoted: bool) -> Any:
    if quoted and kind is not None and (pa.types.is_date(kind) or pa.types.is_timestamp(kind)):
        return _time(text, kind, day=pa.types.is_date(kind))
    return text if quoted else _number(text, kind)


def _number(text: str, kind: pa.DataType | None) -> Any:
    if kind is not None and pa.types.is_decimal(kind):
        return Decimal(text.rstrip("0").rstrip(".") if re.search(r"\.\d+$", text) else text)
    if kind is not None and pa.types.is_integer(kind):
        return _beside_integers(Decimal(text))
    if kind is not None and pa.types.is_floating(kind):
        return float(text)
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def _beside_integers(value: Decimal) -> int | Decimal:
    """A value that compares with every integer of a column as the given one does."""
    if abs(value) >= _BEYOND:
        return _BEYOND.copy_sign(value)
    whole = value.to_integral_value(ROUND_FLOOR, context=_EXACT)
    if value != whole:
        return whole + _HALF
    return int(whole) if -(2**63) <= whole < 2**63 else whole


def _time(text: str, kind: pa.DataType | None, *, day: bool) -> dt.date | dt.datetime:
    """A date or a time, in the way of the column that it is compared with."""
    beside: Any = kind
    if day and not (kind is not None and pa.types.is_timestamp(kind)):
        return dt.date.fromisoformat(text)
    if re.search(r"\.\d{6}\d*[1-9]", text):
        raise LakeError(f"the time {text!r} is finer than a microsecond, which no column is")
    moment = dt.datetime.fromisoformat(text)
    instants = kind is not None and pa.types.is_timestamp(kind) and beside.tz is not None
    return moment.replace(tzinfo=dt.UTC) if instants and not moment.tzinfo else moment
