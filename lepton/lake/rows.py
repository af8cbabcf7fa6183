"""Rows before they are written: the table's columns, in its types, and nothing it forbids.

Pure. A value changes its type only where it stays the same value; everything else is refused,
with the column's name, before any work starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute

from lepton.errors import LakeError
from lepton.lake.fields import nulls
from lepton.lake.predicate import columns_read, expression_of, near_names

pc: Any = pyarrow.compute  # its stubs know no arrays of unknown type


def align(rows: pa.Table, schema: pa.Schema, *, fill: bool = False) -> pa.Table:
    """Return the rows with exactly the columns of ``schema``, in its order and types.

    Args:
        rows: what the caller gave.
        schema: the table's.
        fill: columns that are missing become NULL instead of being refused.

    Raises:
        LakeError: a column is unknown, missing, or of a type that would change its values.
    """
    check_names(rows.schema.names, schema, fill=fill)
    target: Any = schema
    columns: list[Any] = []
    for field in target:
        if field.name in rows.column_names:
            columns.append(_cast(rows[field.name], field))
        else:
            columns.append(pa.chunked_array([nulls(len(rows), field.type)], field.type))
    return pa.table(columns, schema=schema)


def check_names(given: Sequence[str], schema: pa.Schema, *, fill: bool = False) -> None:
    """Raise LakeError for columns that are unknown, twice there, or missing."""
    known = schema.names
    twice = sorted({n for n in given if list(given).count(n) > 1})
    if twice:
        raise LakeError(f"the rows have more than one column {', '.join(twice)}")
    unknown = [n for n in given if n not in known]
    if unknown:
        named = ", ".join(f"{n}{near_names(n, known)}" for n in unknown)
        raise LakeError(f"no column {named}; it has: {', '.join(known)}")
    missing = [n for n in known if n not in given]
    if missing and not fill:
        named = ", ".join(f"{n}{near_names(n, list(given))}" for n in missing)
        raise LakeError(f"the rows lack column {named}; add it (NULL where it may be)")


def check_rows(rows: pa.Table, schema: pa.Schema, constraints: Mapping[str, str]) -> None:
    """Raise LakeError for values that are none, a NULL where none may be, or a broken constraint.

    Args:
        rows: aligned rows.
        schema: the table's, with its nullability.
        constraints: name to SQL condition. As Delta has it, NULL is not true.
    """
    fields: Any = schema
    for field in fields:
        for chunk in rows[field.name].chunks:
            try:
                chunk.validate(full=True)
            except pa.ArrowInvalid as e:  # such as text that is no UTF-8
                raise LakeError(f"column {field.name} has what is no {field.type}: {e}") from e
            for path in _null_paths(chunk, field, field.name):
                raise LakeError(f"column {path} has a NULL, but is declared NOT NULL")
    for name, text in constraints.items():
        _check_constraint(rows, name, text)


def constraint_expression(name: str, text: str, schema: pa.Schema) -> Any:
    """Return a constraint as an Arrow expression.

    Raises:
        LakeError: it cannot be evaluated here.
    """
    import sqlglot
    from sqlglot.errors import SqlglotError

    try:
        return expression_of(sqlglot.parse_one(text, read="spark").sql(), schema)
    except (SqlglotError, LakeError) as e:
        raise LakeError(f"the constraint {name} ({text}) cannot be checked here: {e}") from e


def _check_constraint(rows: pa.Table, name: str, text: str) -> None:
    expression = constraint_expression(name, text, rows.schema)
    broken = len(rows) - len(rows.filter(expression))
    if broken:
        names = [n for n in rows.column_names if n in columns_read(expression, rows.schema)]
        bad = rows.filter(~pc.coalesce(expression, pc.scalar(False)))
        first = bad.select(names).slice(0, 1).to_pylist()[0]
        raise LakeError(f"{broken} rows break the constraint {name} ({text}), such as {first}")


def comparable(rows: pa.Table, key: Sequence[str]) -> pa.Table:
    """Return the key columns alone, with one zero: -0.0 equals it and has other bits."""
    columns = [rows[n] for n in key]
    zeroed = [pc.add(c, pa.scalar(0.0, c.type)) if _float(c.type) else c for c in columns]
    return pa.table(zeroed, names=list(key))


def _float(kind: Any) -> bool:
    return pa.types.is_floating(kind)


def refuse_duplicates(rows: pa.Table, key: Sequence[str]) -> None:
    """Raise LakeError if two rows have the same key, or a key is not there or NULL."""
    for name in key:
        if name not in rows.column_names:
            raise LakeError(f"no key column {name}{near_names(name, rows.column_names)}")
        if rows[name].null_count:
            raise LakeError(f"key column {name} has a NULL, which equals no row")
    counts: Any = (
        comparable(rows, key).group_by(list(key), use_threads=False).aggregate([([], "count_all")])
    )
    twice = counts.filter(pc.field("count_all") > 1)
    if len(twice):
        first = twice.slice(0, 1).to_pylist()[0]
        count = first.pop("count_all")
        raise LakeError(f"{len(twice)} keys are there more than once: {first} is, {count} times")


def _null_paths(array: Any, field: Any, path: str) -> Iterator[str]:
    if not field.nullable and array.null_count:
        yield path
    kind = field.type
    if not pa.types.is_nested(kind) or _all_nullable(kind):
        return
    there = array.filter(array.is_valid())
    if pa.types.is_struct(kind):
        for i in range(kind.num_fields):
            child = kind.field(i)
            yield from _null_paths(pc.struct_field(there, [i]), child, f"{path}.{child.name}")
    elif pa.types.is_map(kind):
        yield from _null_paths(there.items, kind.item_field, f"{path}.value")
    else:
        element: Any = kind.field(0)
        yield from _null_paths(there.flatten(), element, f"{path}.element")


def _all_nullable(kind: Any) -> bool:
    if pa.types.is_map(kind):  # keys are never NULL in Arrow
        return kind.item_field.nullable and _all_nullable(kind.item_type)
    return all(
        kind.field(i).nullable and _all_nullable(kind.field(i).type) for i in range(kind.num_fields)
    )


def _cast(column: Any, field: Any) -> Any:
    kind: Any = column.type
    if isinstance(kind, pa.BaseExtensionType):
        join: Any = pa.chunked_array  # the stubs know no type beside the arrays
        column = join([c.storage for c in column.chunks], kind.storage_type)
    stored: Any = column.type
    if pa.types.is_dictionary(stored):
        column = column.cast(stored.value_type)
    if column.type == field.type:
        return column
    told = f"column {field.name} is {field.type}, and the rows have {kind}"
    if not fits(column.type, field.type):
        raise LakeError(f"{told}; convert it first")
    try:
        cast = column.cast(field.type)
        same = _same_values(column.combine_chunks(), cast.combine_chunks())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as e:
        raise LakeError(f"{told}: {str(e).splitlines()[0]}") from e
    if not same:
        raise LakeError(f"{told}, with values that {field.type} cannot hold exactly")
    return cast


def _same_values(given: Any, cast: Any) -> bool:
    """Whether values survived a cast that may have rounded them; NaN is the same as NaN."""
    kind = given.type
    if pa.types.is_nested(kind):
        return all(_same_values(a, b) for a, b in zip(_members(given), _members(cast), strict=True))
    if not pa.types.is_floating(kind) and not pa.types.is_floating(cast.type):
        return True
    if pa.types.is_float16(kind) and pa.types.is_floating(cast.type):
        return True  # which holds every one of them, and compares none of it
    back = cast.cast(kind)
    equal = pc.equal(back, given)
    if pa.types.is_floating(kind):
        equal = pc.or_kleene(equal, pc.and_(pc.is_nan(back), pc.is_nan(given)))
    return bool(pc.all(equal, min_count=0).as_py())


def _members(array: Any) -> list[Any]:
    """What is inside a nested array's values that are there."""
    there, kind = array.filter(array.is_valid()), array.type
    if pa.types.is_struct(kind):
        return [pc.struct_field(there, [i]) for i in range(kind.num_fields)]
    return [there.keys, there.items] if pa.types.is_map(kind) else [there.flatten()]


def fits(given: Any, wanted: Any) -> bool:
    """Whether values of one Arrow type mean the same in another, as far as they fit."""
    if pa.types.is_null(given) or given == wanted:
        return True
    for is_list in (_is_list, pa.types.is_map):
        if is_list(wanted) or is_list(given):
            return is_list(wanted) and is_list(given) and _members_fit(given, wanted)
    if pa.types.is_struct(wanted) and pa.types.is_struct(given):
        names = [[t.field(i).name for i in range(t.num_fields)] for t in (given, wanted)]
        return names[0] == names[1] and _members_fit(given, wanted)
    if pa.types.is_timestamp(wanted) and pa.types.is_timestamp(given):
        return (given.tz is None) == (wanted.tz is None)
    return any(family(given) and family(wanted) for family in (_number, _text, _bytes, _date))


def _members_fit(given: Any, wanted: Any) -> bool:
    pairs = zip(range(given.num_fields), range(wanted.num_fields), strict=True)
    return all(fits(given.field(a).type, wanted.field(b).type) for a, b in pairs)


def _is_list(kind: Any) -> bool:
    types: Any = pa.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _number(kind: Any) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def _text(kind: Any) -> bool:
    types: Any = pa.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _bytes(kind: Any) -> bool:
    types: Any = pa.types
    return (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
    )


def _date(kind: Any) -> bool:
    return pa.types.is_date(kind)
