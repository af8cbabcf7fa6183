"""Row filters: a SQL-like string or a ``pyarrow.compute`` expression, and which columns it reads.

SQL is parsed by sqlglot and translated node by node; anything outside the list below is refused
rather than guessed at. Rows for which the condition is null are not kept, as in SQL.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lepton.errors import LakeError


def expression_of(condition: pc.Expression | str, schema: pa.Schema) -> pc.Expression:
    """Return the condition as an Arrow expression, checked against ``schema``.

    Raises:
        LakeError: it does not parse, uses something unsupported, or names an unknown column.
    """
    expression: Any = _parse(condition) if isinstance(condition, str) else condition
    if not isinstance(expression, pc.Expression):
        raise TypeError(
            "where() takes a SQL-like string or a pyarrow.compute expression, "
            f"not {type(condition).__name__}"
        )
    try:
        schema.empty_table().filter(expression)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as e:
        raise LakeError(
            f"the filter {condition!s} does not fit the table{_near(str(e), schema)}: "
            f"{str(e).splitlines()[0]}; columns: " + ", ".join(f"{f.name} {f.type}" for f in schema)
        ) from e
    return expression


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


def _parse(text: str) -> pc.Expression:
    import sqlglot
    from sqlglot.errors import SqlglotError

    try:
        return _translate(sqlglot.parse_one(text))
    except SqlglotError as e:
        raise LakeError(f"cannot parse the filter {text!r}: {str(e).splitlines()[0]}") from e


def _translate(node: Any) -> Any:
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
        return binary[type(node)](_translate(node.this), _translate(node.expression))
    if isinstance(node, exp.Paren):
        return _translate(node.this)
    if isinstance(node, exp.Not):
        return ~_translate(node.this)
    if isinstance(node, exp.Column):
        return pc.field(*[part.name for part in node.parts])
    return _translate_leaf(node)


def _translate_leaf(node: Any) -> Any:
    from sqlglot import exp

    if isinstance(node, exp.Literal | exp.Neg | exp.Boolean | exp.Cast):
        return pc.scalar(constant_of(node))
    if isinstance(node, exp.Is) and isinstance(node.expression, exp.Null):
        return _translate(node.this).is_null()
    if isinstance(node, exp.In) and node.expressions:
        return _translate(node.this).isin([constant_of(v) for v in node.expressions])
    if isinstance(node, exp.Between):
        value = _translate(node.this)
        return (value >= _translate(node.args["low"])) & (value <= _translate(node.args["high"]))
    raise LakeError(
        f"the filter uses {node.sql()!r}, which is not supported; use comparisons, AND, OR, NOT, "
        "IN (...), BETWEEN, IS NULL, + - * /, or pass a pyarrow.compute expression"
    )


def constant_of(node: Any) -> Any:
    """Return the Python value of a parsed SQL constant."""
    from sqlglot import exp

    if isinstance(node, exp.Neg):
        return -constant_of(node.this)
    if isinstance(node, exp.Boolean):
        return bool(node.this)
    if isinstance(node, exp.Cast) and isinstance(node.this, exp.Literal):
        import datetime as dt

        kind = node.to.sql().upper()
        if kind == "DATE":
            return dt.date.fromisoformat(node.this.this)
        if kind.startswith("TIMESTAMP"):
            return dt.datetime.fromisoformat(node.this.this)
    if isinstance(node, exp.Literal):
        text = str(node.this)
        if node.is_string:
            return text
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    raise LakeError(f"the filter needs a constant where it has {node.sql()!r}")
