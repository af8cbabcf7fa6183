"""Fit the steps of a preparation to data, in one pass over it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

import pyarrow as pa

from lepton.preprocess.elements import element_type, is_number, is_scalar, is_text
from lepton.preprocess.statistics import Rule, Summary
from lepton.preprocess.steps import (
    Cast,
    Categories,
    Fill,
    MinMax,
    Standard,
    Step,
    named_type,
    scaled_type,
)

RULES = ("mean", "median", "most_frequent")


@runtime_checkable
class ArrowSource(Protocol):
    """Anything that can be read whole as an Arrow table; a lepton Snapshot is one."""

    def to_arrow(self) -> pa.Table:
        """Return all rows."""
        ...


Data: TypeAlias = (
    pa.Table | pa.RecordBatchReader | Iterable[pa.Table | pa.RecordBatch] | ArrowSource
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Which columns get which steps."""

    minmax: Sequence[str] = ()
    standard: Sequence[str] = ()
    fill: Mapping[str, bool | int | float | str]
    categories: Sequence[str] = ()
    clip: bool = False

    def __post_init__(self) -> None:
        for name in ("minmax", "standard", "categories"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a sequence of column names, not one string")
        coded = [*self.minmax, *self.standard, *self.categories]
        twice = sorted({c for c in coded if coded.count(c) > 1})
        if twice:
            raise ValueError(
                f"columns {twice} are named more than once among minmax, standard and categories: "
                "give each column one of them"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the steps touch, in the order they are named."""
        return tuple(dict.fromkeys([*self.fill, *self.minmax, *self.standard, *self.categories]))

    def rule(self, column: str) -> Rule | None:
        """Return the rule that the column's fill value follows, or None for a constant or none."""
        value = self.fill.get(column)
        return value if value in RULES else None

    def scaled(self, column: str) -> bool:
        """Return whether the column is to be scaled."""
        return column in self.minmax or column in self.standard


def fit_steps(data: Data, plan: Plan) -> tuple[Step, ...]:
    """Return the fitted steps: casts to the types seen, then fills, then scales and categories.

    The casts make a request's JSON numbers (float64, int64) take the path of the training rows.

    Raises:
        ValueError: a column is missing, has no values, or is of a type that its step cannot take.
    """
    if not plan.columns:
        return ()
    tables = _tables(data, plan.columns)
    first = next(tables, None)
    if first is None:
        raise ValueError("there is no data to fit the preparation on: give at least one table")
    types = _types(first.schema, plan.columns)
    pins = {c: pin for c, t in types.items() if (pin := _pin(c, t))}
    pinned = {c: pins[c].result(t) if c in pins else t for c, t in types.items()}
    for column, data_type in pinned.items():
        _check(column, data_type, plan)
    summaries = {c: _summary(c, plan) for c in plan.columns}
    _gather(chain([first], tables), types, pins, summaries)
    fitted = [_fitted(summaries[c], pinned[c], plan) for c in plan.columns]
    fills = [s for steps in fitted for s in steps if isinstance(s, Fill)]
    return (*pins.values(), *fills, *(s for f in fitted for s in f if not isinstance(s, Fill)))


def check_columns(schema: pa.Schema, columns: Sequence[str]) -> None:
    """Check that every column is there, once.

    Raises:
        ValueError: lists what is needed and what there is.
    """
    wrong = [c for c in columns if schema.names.count(c) != 1]
    if wrong:
        raise ValueError(
            f"the preparation needs the columns {list(columns)}, each once; the table has "
            f"{schema.names} (missing or twice: {wrong})"
        )


def _tables(data: Data, columns: Sequence[str]) -> Iterator[pa.Table]:
    if isinstance(data, (pa.Table, pa.RecordBatch)):
        source: Iterable[Any] = [data]
    elif isinstance(data, ArrowSource):
        source = _snapshot_tables(data, columns)
    else:
        source = data
    for item in source:
        if isinstance(item, pa.RecordBatch):
            yield pa.Table.from_batches([item])
        elif isinstance(item, pa.Table):
            yield item
        else:
            raise TypeError(f"cannot fit on a {type(item).__name__}: give Arrow tables")


def _snapshot_tables(data: ArrowSource, columns: Sequence[str]) -> Iterable[pa.Table]:
    """Read a lepton Snapshot file by file and only what is fitted; anything else whole."""
    source = cast(Any, data)
    if not (hasattr(source, "select") and hasattr(source, "batches")):
        return [data.to_arrow()]
    check_columns(source.schema, columns)
    return source.select(list(columns)).batches()


def _types(schema: pa.Schema, columns: Sequence[str]) -> dict[str, pa.DataType]:
    check_columns(schema, columns)
    return {c: schema.field(c).type for c in columns}


def _pin(column: str, data_type: pa.DataType) -> Cast | None:
    element = element_type(data_type)
    if pa.types.is_dictionary(element):
        element = cast(Any, element).value_type
    if pa.types.is_decimal(element):
        element = pa.float64()
    if pa.types.is_null(element):
        return None
    try:
        return Cast(column=column, type=named_type(str(element)))
    except ValueError:
        return None


def _check(column: str, data_type: pa.DataType, plan: Plan) -> None:
    if plan.scaled(column):
        scaled_type(column, data_type)
    if column in plan.fill:
        _check_fill(column, data_type, plan)
    if column in plan.categories and not (is_text(data_type) or pa.types.is_integer(data_type)):
        raise ValueError(
            f"column {column!r} is {data_type}, which cannot be made categories: cast it to "
            "strings or integers, or use minmax or standard for numbers"
        )


def _check_fill(column: str, data_type: pa.DataType, plan: Plan) -> None:
    value, rule = plan.fill[column], plan.rule(column)
    if rule is None:
        Fill(column=column, value=value).typed(data_type)
    if not is_scalar(data_type):
        raise ValueError(f"column {column!r} is {data_type}: fill works on scalar columns only")
    if rule in ("mean", "median"):
        if not is_number(data_type):
            raise ValueError(
                f"column {column!r} is {data_type} and has no {rule}: fill it with a constant "
                "or most_frequent"
            )
        if column in plan.categories:
            raise ValueError(
                f"column {column!r} becomes categories, which a {rule} is not: fill it with a "
                "constant or most_frequent"
            )
    elif not (is_number(data_type) or is_text(data_type) or pa.types.is_boolean(data_type)):
        raise ValueError(f"column {column!r} is {data_type}: fill takes numbers, strings, booleans")


def _summary(column: str, plan: Plan) -> Summary:
    rule = plan.rule(column)
    return Summary(
        column=column,
        numeric=plan.scaled(column) or rule in ("mean", "median"),
        keep=rule == "median",
        tally=rule == "most_frequent" or column in plan.categories,
    )


def _gather(
    tables: Iterable[pa.Table],
    types: Mapping[str, pa.DataType],
    pins: Mapping[str, Cast],
    summaries: Mapping[str, Summary],
) -> None:
    rows = 0
    for table in tables:
        here = _types(table.schema, tuple(types))
        changed = [c for c in types if here[c] != types[c]]
        if changed:
            raise ValueError(
                f"the type of {changed} changes from one table to the next: cast all tables to "
                "one schema first"
            )
        rows += len(table)
        for column, summary in summaries.items():
            part = table.select([column])
            summary.add((pins[column](part) if column in pins else part).column(column))
    if not rows:
        raise ValueError("there are no rows to fit the preparation on: give a table that has some")


def _fitted(summary: Summary, data_type: pa.DataType, plan: Plan) -> list[Step]:
    column = summary.column
    steps: list[Step] = []
    moments, counts = summary.moments(), summary.counts
    if column in plan.fill:
        rule = plan.rule(column)
        value = summary.fill_value(rule) if rule else plan.fill[column]
        fill = Fill(column=column, value=value)
        steps.append(fill)
        moments, counts = summary.filled(fill.typed(data_type).as_py())
    if (plan.scaled(column) and not moments.count) or (column in plan.categories and not counts):
        raise ValueError(
            f"column {column!r} has no values (all are null or NaN): fill it with a constant, "
            f"fill={{{column!r}: …}}, or leave it out"
        )
    if column in plan.minmax:
        steps.append(MinMax(column=column, low=moments.low, high=moments.high, clip=plan.clip))
    if column in plan.standard:
        steps.append(Standard(column=column, mean=moments.center(), std=moments.spread()))
    if column in plan.categories:
        steps.append(Categories(column=column, values=tuple(sorted(counts))))
    return steps
