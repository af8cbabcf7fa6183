"""Row filters: a SQL-like string or a ``pyarrow.compute`` expression, and which columns it reads.

SQL is parsed by sqlglot and translated node by node; anything outside the list below is refused
rather than guessed at. Rows for which the condition is null are not kept, as in SQL.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lepton.errors import LakeError


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


def _parse(text: str, schema: pa.Schema | None = None) -> pc.Expression:
    import sqlglot
    from sqlglot.errors import SqlglotError

    try:
        return _translate(sqlglot.parse_one(text), _decimals(schema))
    except SqlglotError as e:
        raise LakeError(f"cannot parse the filter {text!r}: {str(e).splitlines()[0]}") from e


def _decimals(schema: pa.Schema | None) -> frozenset[str]:
    """Columns and members of decimal type, by dotted name."""
    if schema is None:
        return frozenset()
    leaves: list[tuple[str, Any]] = [(f.name, f.type) for f in schema]
    found: set[str] = set()
    while leaves:
        name, kind = leaves.pop()
        if pa.types.is_struct(kind):
            leaves += [(f"{name}.{m.name}", m.type) for m in kind]
        elif pa.types.is_decimal(kind):
            found.add(name)
    return frozenset(found)


def _translate(node: Any, decimals: frozenset[str]) -> Any:
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
        exact = any(_is_decimal(side, decimals) for side in sides)
        left, right = (_operand(side, decimals, exact=exact) for side in sides)
        return binary[type(node)](left, right)
    if isinstance(node, exp.Paren):
        return _translate(node.this, decimals)
    if isinstance(node, exp.Not):
        return ~_translate(node.this, decimals)
    if isinstance(node, exp.Column):
        return pc.field(*[part.name for part in node.parts])
    return _translate_leaf(node, decimals)


def _is_decimal(node: Any, decimals: frozenset[str]) -> bool:
    """Whether a node is a decimal column, or arithmetic on nothing but such and constants."""
    from sqlglot import exp

    names = [".".join(p.name for p in c.parts) for c in node.find_all(exp.Column)]
    return bool(names) and all(n in decimals for n in names)


def _operand(node: Any, decimals: frozenset[str], *, exact: bool) -> Any:
    if exact and _is_constant(node):
        return pc.scalar(constant_of(node, exact=True))
    return _translate(node, decimals)


def _is_constant(node: Any) -> bool:
    from sqlglot import exp

    return isinstance(node, exp.Literal | exp.Neg | exp.Boolean | exp.Cast)


def _translate_leaf(node: Any, decimals: frozenset[str]) -> Any:
    from sqlglot import exp

    if _is_constant(node):
        return pc.scalar(constant_of(node))
    if isinstance(node, exp.Is) and isinstance(node.expression, exp.Null):
        return _translate(node.this, decimals).is_null()
    exact = isinstance(node, exp.In | exp.Between) and _is_decimal(node.this, decimals)
    if isinstance(node, exp.In) and node.expressions:
        members = [constant_of(v, exact=exact) for v in node.expressions]
        if exact:  # membership casts its members to the column's type, which may not hold them
            value = _translate(node.this, decimals)
            return reduce(lambda a, b: a | b, [value == pc.scalar(m) for m in members])
        return _translate(node.this, decimals).isin(members)
    if isinstance(node, exp.Between):
        value = _translate(node.this, decimals)
        low, high = (_operand(node.args[k], decimals, exact=exact) for k in ("low", "high"))
        return (value >= low) & (value <= high)
    raise LakeError(
        f"the filter uses {node.sql()!r}, which is not supported; use comparisons, AND, OR, NOT, "
        "IN (...), BETWEEN, IS NULL, + - * /, or pass a pyarrow.compute expression"
    )


def constant_of(node: Any, *, exact: bool = False) -> Any:
    """Return the Python value of a parsed SQL constant.

    Args:
        node: the constant.
        exact: a number is to be compared with decimals: it stays a decimal itself.
    """
    from sqlglot import exp

    if isinstance(node, exp.Neg):
        return -constant_of(node.this, exact=exact)
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
        if exact:
            return Decimal(text.rstrip("0").rstrip(".") if re.search(r"\.\d+$", text) else text)
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    raise LakeError(f"the filter needs a constant where it has {node.sql()!r}")
