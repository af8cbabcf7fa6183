"""Row filters: a SQL-like string or a ``pyarrow.compute`` expression, and which columns it reads.

SQL is parsed by sqlglot and translated node by node (:mod:`lepton.lake.translation`); anything
outside its list is refused rather than guessed at. Rows for which the condition is null are not
kept, as in SQL.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Sequence
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from lepton.errors import LakeError
from lepton.lake.fields import nulls
from lepton.lake.translation import expression_from, types_of


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


def sql_of(condition: pc.Expression | str, schema: pa.Schema) -> str | None:
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
        same = bool(original.equals(_parse(text, schema)))
    except (SqlglotError, LakeError, ValueError):
        return None
    return text if same else None


def text_of(expression: pc.Expression) -> str:
    """Return a text that two expressions share only if they are the same.

    How an expression prints, unless long lists or values are shortened there: then also a hash of
    all of it.
    """
    printed = str(expression)
    if "..." not in printed:
        return printed
    _, (whole, *_) = cast("Any", expression).__reduce__()
    return f"{printed} {hashlib.sha256(whole).hexdigest()}"


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


def _parse(text: str, schema: pa.Schema) -> pc.Expression:
    import sqlglot
    from sqlglot.errors import SqlglotError

    try:
        return expression_from(sqlglot.parse_one(text), types_of(schema))
    except RecursionError as e:
        raise LakeError(
            f"the filter {text[:100]!r}... is too deep: use IN (...) for many ORs"
        ) from e
    except (SqlglotError, ValueError, OverflowError) as e:  # Arrow's errors are ValueErrors
        raise LakeError(f"cannot parse the filter {text!r}: {str(e).splitlines()[0]}") from e
