"""Row filters: a SQL-like string or a ``pyarrow.compute`` expression, and which columns it reads.

SQL is parsed by sqlglot and translated node by node; anything outside the list below is refused
rather than guessed at. Rows for which the condition is null are not kept, as in SQL.
"""

from __future__ import annotations

import datetime as dt
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lepton.errors import LakeError
from lepton.lake.fields import nulls


def expression_of(condition: pc.Expression | str, schema: pa.Schema) -> pc.Expression:
    """Return the condition as an Arrow expression, checked against ``schema``.

    Raises:
        LakeError: it does not parse, uses something unsupported, or names an unknown column.
    """
    expression: Any = _parse(condition, schema) if isinstance(condition, str) else condition
    if not isinstance(expression, pc.Expression):
        raise TypeError(
            "where() takes a SQL-like string or a pyarrow.compute expression, "
            f"not {type(condition).__name__}"
        )
    try:
        _one_row(schema).filter(expression)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as e:
        raise LakeError(
            f"the filter {condition!s} does not fit the table{_near(str(e), schema)}: "
            f"{str(e).splitlines()[0]}; columns: " + ", ".join(f"{f.name} {f.type}" for f in schema)
        ) from e
    return expression


def _one_row(schema: pa.Schema) -> pa.Table:
    """A row of nulls: some types are found not to match only where there is a row to compare."""
    kinds: list[Any] = [field.type for field in schema]
    return pa.table([nulls(1, kind) for kind in kinds], names=schema.names)


def near_names(name: str, known: Sequence[str]) -> str:
    """Return " (did you mean ...?)" for the known names close to one, or nothing."""
    lower = {k.lower(): k for k in known}
    close = [lower[n] for n in difflib.get_close_matches(name.lower(), list(lower), n=3)]
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _near(message: str, schema: pa.Schema) -> str:
    missing = re.search(r"FieldRef\.Name\((.+?)\)", message)
    return near_names(missing[1], schema.names) if missing else ""


def sql_of(condition: pc.Expression | str) -> str | None:
    """Return the condition as SQL text, for judging statistics; None where that is not certain.

    An Arrow expression is read from how it prints, and only trusted when the text makes an equal
    expression again.
    """
    if isinstance(condition, str):
        return condition
    import sqlglot
    from sqlglot.errors import SqlglotError

    printed = re.sub(r"is_null\((\w+), \{nan_is_null=false\}\)", r"(\1 IS NULL)", str(condition))
    try:
        text = sqlglot.parse_one(printed.replace("invert(", "(not "), read="spark").sql()
        original: Any = condition
        same = bool(original.equals(_parse(text)))
    except (SqlglotError, LakeError, ValueError):
        return None
    return text if same else None


def columns_read(expression: pc.Expression, schema: pa.Schema) -> frozenset[str]:
    """Return the columns an expression refers to: those it cannot be evaluated without."""
    empty = schema.empty_table()
    return frozenset(name for name in schema.names if not _evaluates(expression, empty, name))


def _evaluates(expression: pc.Expression, empty: pa.Table, without: str) -> bool:
    try:
        empty.drop_columns(without).filter(expression)
    except pa.ArrowInvalid:
        return False
    return True


def _parse(text: str, schema: pa.Schema | None = None) -> pc.Expression:
    import sqlglot
    from sqlglot.errors import SqlglotError

    try:
        return _translate(sqlglot.parse_one(text), _types(schema))
    except (SqlglotError, ValueError) as e:
        raise LakeError(f"cannot parse the filter {text!r}: {str(e).splitlines()[0]}") from e


_Types = Mapping[str, pa.DataType]


def _types(schema: pa.Schema | None) -> _Types:
    """Types of columns and members, by dotted name."""
    leaves: list[tuple[str, Any]] = [(f.name, f.type) for f in schema or ()]
    found: dict[str, pa.DataType] = {}
    while leaves:
        name, kind = leaves.pop()
        found[name] = kind
        if pa.types.is_struct(kind):
            leaves += [(f"{name}.{m.name}", m.type) for m in kind]
    return found


def _translate(node: Any, types: _Types) -> Any:
    from sqlglot import exp

    binary: dict[type, Callable[[Any, Any], Any]] = {
        exp.And: lambda a, b: a & b,
        exp.Or: lambda a, b: a | b,
        exp.EQ: lambda a, b: a == b,
        exp.NEQ: lambda a, b: a != b,
        exp.LT: lambda a, b: a < b,
        exp.LTE: lambda a, b: a <= b,
        exp.GT: lambda a, b: a > b,
        exp.GTE: lambda a, b: a >= b,
        exp.Add: lambda a, b: a + b,
        exp.Sub: lambda a, b: a - b,
        exp.Mul: lambda a, b: a * b,
        exp.Div: lambda a, b: a / b,
    }
    if type(node) in binary:
        sides = node.this, node.expression
        kind = _kind(node, types)
        left, right = (_operand(side, types, kind) for side in sides)
        return binary[type(node)](left, right)
    if isinstance(node, exp.Paren):
        return _translate(node.this, types)
    if isinstance(node, exp.Not):
        return ~_translate(node.this, types)
    if isinstance(node, exp.Column):
        return pc.field(*[part.name for part in node.parts])
    return _translate_leaf(node, types)


def _kind(node: Any, types: _Types) -> pa.DataType | None:
    """The type of what a node's constants are compared with, where all its columns agree on it."""
    from sqlglot import exp

    names = {".".join(p.name for p in c.parts) for c in node.find_all(exp.Column)}
    found = {types.get(name) for name in names}
    decimals = [k for k in found if k is not None and pa.types.is_decimal(k)]
    if decimals and len(decimals) == len(found):
        return decimals[0]
    return found.pop() if len(found) == 1 else None


def _operand(node: Any, types: _Types, kind: pa.DataType | None) -> Any:
    return pc.scalar(constant_of(node, kind)) if _is_constant(node) else _translate(node, types)


def _is_constant(node: Any) -> bool:
    from sqlglot import exp

    return isinstance(node, exp.Literal | exp.Neg | exp.Boolean | exp.Cast)


def _translate_leaf(node: Any, types: _Types) -> Any:
    from sqlglot import exp

    if _is_constant(node):
        return pc.scalar(constant_of(node))
    if isinstance(node, exp.Is) and isinstance(node.expression, exp.Null):
        return _translate(node.this, types).is_null()
    kind = _kind(node, types)
    if isinstance(node, exp.In) and node.expressions:
        members = [constant_of(v, kind) for v in node.expressions]
        if kind is not None and pa.types.is_decimal(
            kind
        ):  # membership casts its members to the column's type, which may not hold them
            value = _translate(node.this, types)
            return reduce(lambda a, b: a | b, [value == pc.scalar(m) for m in members])
        return _translate(node.this, types).isin(members)
    if isinstance(node, exp.Between):
        value = _translate(node.this, types)
        low, high = (_operand(node.args[k], types, kind) for k in ("low", "high"))
        return (value >= low) & (value <= high)
    raise LakeError(
        f"the filter uses {node.sql()!r}, which is not supported; use comparisons, AND, OR, NOT, "
        "IN (...), BETWEEN, IS NULL, + - * /, or pass a pyarrow.compute expression"
    )


def constant_of(node: Any, kind: pa.DataType | None = None) -> Any:
    """Return the Python value of a parsed SQL constant.

    Args:
        node: the constant.
        kind: the type that it is compared with, where known: beside a decimal a number is a
            decimal, text beside a date or a time is one too, and beside an instant a time
            without a zone is in UTC.
    """
    from sqlglot import exp

    if isinstance(node, exp.Neg):
        return -constant_of(node.this, kind)
    if isinstance(node, exp.Boolean):
        return bool(node.this)
    if isinstance(node, exp.Cast) and isinstance(node.this, exp.Literal):
        wanted = node.to.sql().upper()
        if wanted == "DATE" or wanted.startswith("TIMESTAMP"):
            return _time(str(node.this.this), kind, day=wanted == "DATE")
    if isinstance(node, exp.Literal):
        return _literal(str(node.this), kind, quoted=bool(node.is_string))
    raise LakeError(f"the filter needs a constant where it has {node.sql()!r}")


def _literal(text: str, kind: pa.DataType | None, *, quoted: bool) -> Any:
    if quoted and kind is not None and (pa.types.is_date(kind) or pa.types.is_timestamp(kind)):
        return _time(text, kind, day=pa.types.is_date(kind))
    if quoted:
        return text
    if kind is not None and pa.types.is_decimal(kind):
        return Decimal(text.rstrip("0").rstrip(".") if re.search(r"\.\d+$", text) else text)
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def _time(text: str, kind: pa.DataType | None, *, day: bool) -> dt.date | dt.datetime:
    """A date or a time, in the way of the column that it is compared with."""
    beside: Any = kind
    if day and not (kind is not None and pa.types.is_timestamp(kind)):
        return dt.date.fromisoformat(text)
    moment = dt.datetime.fromisoformat(text)
    instants = kind is not None and pa.types.is_timestamp(kind) and beside.tz is not None
    return moment.replace(tzinfo=dt.UTC) if instants and not moment.tzinfo else moment
