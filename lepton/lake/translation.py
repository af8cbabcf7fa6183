"""Parsed SQL conditions as Arrow expressions, node by node; what is not listed here is refused.

Pure. As Spark has it: ``IN`` is what its equalities say (a NULL is in no list, and in none it is
not either), integers are added as 64 bits, ``/`` divides as doubles do and by zero gives NULL. An
integer that overflows stops the reading instead of going round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import pyarrow as pa
import pyarrow.compute as pc

from lepton.errors import LakeError
from lepton.lake.constants import constant_of, is_constant

Types: TypeAlias = Mapping[tuple[str, ...], pa.DataType]
Kind: TypeAlias = "pa.DataType | None"

_SUPPORTED = (
    "use comparisons, AND, OR, NOT, IN (...), BETWEEN, IS NULL, + - * /, or pass a "
    "pyarrow.compute expression"
)


def types_of(schema: pa.Schema) -> Types:
    """Return the types of columns and of members of structs, by their names from outside in."""
    leaves: list[tuple[tuple[str, ...], Any]] = [((f.name,), f.type) for f in schema]
    found: dict[tuple[str, ...], pa.DataType] = {}
    while leaves:
        name, kind = leaves.pop()
        found[name] = kind
        if pa.types.is_struct(kind):
            leaves += [((*name, m.name), m.type) for m in kind]
    return found


def expression_from(node: Any, types: Types) -> Any:
    """Return a parsed condition (sqlglot) as an Arrow expression.

    Raises:
        LakeError: something in it is not supported.
    """
    from sqlglot import exp

    if isinstance(node, exp.Paren):
        return expression_from(node.this, types)
    if isinstance(node, exp.Not):
        return ~expression_from(node.this, types)
    if isinstance(node, exp.And | exp.Or):
        left, right = (expression_from(side, types) for side in (node.this, node.expression))
        return left & right if isinstance(node, exp.And) else left | right
    if isinstance(node, exp.Column):
        return pc.field(*_names(node))
    if is_constant(node):
        return pc.scalar(constant_of(node))
    if isinstance(node, exp.Add | exp.Sub | exp.Mul | exp.Div):
        return _arithmetic(node, types)
    return _comparison(node, types)


def _comparison(node: Any, types: Types) -> Any:
    from sqlglot import exp

    by_kind: dict[type, Callable[[Any, Any], Any]] = {
        exp.EQ: lambda a, b: a == b,
        exp.NEQ: lambda a, b: a != b,
        exp.LT: lambda a, b: a < b,
        exp.LTE: lambda a, b: a <= b,
        exp.GT: lambda a, b: a > b,
        exp.GTE: lambda a, b: a >= b,
    }
    if type(node) in by_kind:
        left, right = node.this, node.expression
        return by_kind[type(node)](
            _beside(left, _kind(right, types), types), _beside(right, _kind(left, types), types)
        )
    if isinstance(node, exp.Is) and isinstance(node.expression, exp.Null):
        return expression_from(node.this, types).is_null()
    kind = _kind(node.this, types) if isinstance(node, exp.In | exp.Between) else None
    if isinstance(node, exp.In) and node.expressions:
        return _membership(expression_from(node.this, types), node.expressions, kind)
    if isinstance(node, exp.Between):
        value = expression_from(node.this, types)
        low, high = (_beside(node.args[end], kind, types) for end in ("low", "high"))
        return (value >= low) & (value <= high)
    raise LakeError(f"the filter uses {node.sql()!r}, which is not supported; {_SUPPORTED}")


def _names(column: Any) -> tuple[str, ...]:
    return tuple(str(part.name) for part in column.parts)


def _beside(node: Any, kind: Kind, types: Types) -> Any:
    return pc.scalar(constant_of(node, kind)) if is_constant(node) else expression_from(node, types)


def _membership(value: Any, nodes: Sequence[Any], kind: Kind) -> Any:
    members = [constant_of(n, kind) for n in nodes]
    plain = kind is not None and not pa.types.is_floating(kind) and not pa.types.is_decimal(kind)
    if plain and (all(type(m) is int for m in members) or all(type(m) is str for m in members)):
        return value.isin(members) | (value != value)  # which is false, and NULL for a NULL
    return _any([value == pc.scalar(m) for m in members])


def _any(parts: list[Any]) -> Any:
    """Their disjunction, as a tree that is not deep."""
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=False)
        parts = [a | b for a, b in pairs] + parts[len(parts) - len(parts) % 2 :]
    return parts[0]


def _arithmetic(node: Any, types: Types) -> Any:
    from sqlglot import exp

    sides = node.this, node.expression
    kind = _kind(node, types)
    left, right = (_operand(side, kind, types) for side in sides)
    if isinstance(node, exp.Add):
        return left + right
    if isinstance(node, exp.Sub):
        return left - right
    if isinstance(node, exp.Mul):
        return left * right
    either, scalar = cast("Any", pc.if_else), cast("Any", pc.scalar)
    return left / either(right == scalar(0), scalar(None), right)


def _operand(node: Any, kind: Kind, types: Types) -> Any:
    """One side of + - * /, in the type that they are worked out in, where that is known."""
    value = _beside(node, kind if kind is not None and pa.types.is_decimal(kind) else None, types)
    if kind is None or pa.types.is_decimal(kind):
        return value
    return value.cast(kind, safe=pa.types.is_integer(kind))


def _kind(node: Any, types: Types) -> Kind:
    """The type of a node's values; None where it is a constant's, or not certain."""
    from sqlglot import exp

    if isinstance(node, exp.Paren):
        return _kind(node.this, types)
    if isinstance(node, exp.Column):
        return types.get(_names(node))
    if not isinstance(node, exp.Add | exp.Sub | exp.Mul | exp.Div):
        return None
    kinds = [_number_kind(side, types) for side in (node.this, node.expression)]
    if any(k is None for k in kinds):
        return None
    if isinstance(node, exp.Div):
        return pa.float64()
    decimals = [k for k in kinds if pa.types.is_decimal(k)]
    if decimals:
        return decimals[0]
    if any(pa.types.is_floating(k) for k in kinds):
        return pa.float64()
    return pa.int64()


def _number_kind(node: Any, types: Types) -> Any:
    if not is_constant(node):
        kind: Any = _kind(node, types)
        numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
        return kind if kind is not None and any(holds(kind) for holds in numbers) else None
    value = constant_of(node)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return pa.int64() if isinstance(value, int) else pa.float64()
