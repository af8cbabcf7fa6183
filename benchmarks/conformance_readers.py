"""The readers that are compared, each used as its documentation says for a Delta table."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache, reduce
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.conformance_tables import Case

Read = Callable[[Case], Any]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One way to read Delta tables.

    Attributes:
        read: gives an Arrow table, or the number of rows where that is asked.
        needs: the distributions that it needs.
        title: what it is called in print.
    """

    title: str
    read: Read
    needs: tuple[str, ...]


def sql(case: Case) -> str:
    """Return the case's conditions as SQL."""
    return " AND ".join(
        f'"{c}" IS NULL' if o == "null" else f'"{c}" {o} {_literal(v)}' for c, o, v in case.where
    )


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return f"'{value}'"
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, dt.datetime):
        return f"CAST('{value.isoformat(sep=' ')}' AS TIMESTAMP)"
    return repr(value)


def _expression(case: Case, column: Callable[[str], Any], literal: Callable[[Any], Any]) -> Any:
    """Return the conditions in an expression language that overloads operators."""
    by: dict[str, Callable[[Any, Any], Any]] = {
        "=": lambda a, b: a == b,
        "<>": lambda a, b: a != b,
        "<": lambda a, b: a < b,
        "<=": lambda a, b: a <= b,
        ">": lambda a, b: a > b,
        ">=": lambda a, b: a >= b,
        "null": lambda a, _: a.is_null(),
    }
    return reduce(lambda a, b: a & b, (by[o](column(c), literal(v)) for c, o, v in case.where))


def _lepton(case: Case) -> Any:
    snapshot = _snapshot(case)
    return snapshot.count_rows() if case.ask == "count" else snapshot.to_arrow()


def _lepton_ray(case: Case) -> Any:
    _ray()
    return _dataset(_snapshot(case).to_dataset(), case)


def _snapshot(case: Case) -> Any:
    import lepton

    snapshot = lepton.table(case.table, version=case.version)
    return snapshot.where(sql(case)) if case.where else snapshot


def _ray_data(case: Case) -> Any:
    import ray.data  # noqa: TID251 - the peer itself
    from ray.data.expressions import col, lit  # noqa: TID251

    _ray()
    data = ray.data.read_delta(str(case.table), version=case.version)  # noqa: TID251
    return _dataset(data.filter(expr=_expression(case, col, lit)) if case.where else data, case)


def _dataset(data: Any, case: Case) -> Any:
    import ray

    if case.ask == "count":
        return data.count()
    tables = ray.get(data.to_arrow_refs())
    return pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})


@cache
def _ray() -> None:
    import ray
    import ray.data  # noqa: TID251

    if not ray.is_initialized():
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=200_000_000,
        )
    ray.data.DataContext.get_current().enable_progress_bars = False  # noqa: TID251


def _datafusion(case: Case) -> Any:
    from deltalake import DeltaTable, QueryBuilder

    table = DeltaTable(case.table, version=case.version)
    what = "count(*)" if case.ask == "count" else "*"
    text = f"SELECT {what} FROM t" + (f" WHERE {sql(case)}" if case.where else "")
    found = pa.table(QueryBuilder().register("t", table).execute(text).read_all())
    return found[0][0].as_py() if case.ask == "count" else found


def _deltalake(case: Case) -> Any:
    import pyarrow.compute as pc
    from deltalake import DeltaTable

    table = DeltaTable(case.table, version=case.version)
    if case.ask == "count":
        return table.count()
    data = table.to_pyarrow_dataset()
    return data.to_table(filter=_expression(case, pc.field, pc.scalar) if case.where else None)


def _duckdb(case: Case) -> Any:
    version = "" if case.version is None else f", version={case.version}"
    what = "count(*)" if case.ask == "count" else "*"
    text = f"SELECT {what} FROM delta_scan('{case.table}'{version})"
    text += f" WHERE {sql(case)}" if case.where else ""
    found = _duck().execute(text).to_arrow_table()
    return found[0][0].as_py() if case.ask == "count" else found


@cache
def _duck() -> Any:
    """DuckDB with its delta extension from the registry; the usual way downloads it when used."""
    import duckdb
    import duckdb_extension_delta

    folder = Path(duckdb_extension_delta.__file__).parent / "extensions"
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute(f"LOAD '{next(folder.rglob('*.duckdb_extension'))}'")
    return connection


def _polars(case: Case) -> Any:
    import polars as pl

    rows = pl.scan_delta(str(case.table), version=case.version)
    if case.where:
        rows = rows.filter(_expression(case, pl.col, pl.lit))
    return (
        rows.select(pl.len()).collect().item() if case.ask == "count" else rows.collect().to_arrow()
    )


def _daft(case: Case) -> Any:
    import daft

    rows: Any = daft.read_deltalake(str(case.table), version=case.version)
    if case.where:
        rows = rows.where(_expression(case, daft.col, daft.lit))
    return rows.count_rows() if case.ask == "count" else rows.to_arrow()


READERS: dict[str, Reader] = {
    "lepton": Reader(title="lepton", read=_lepton, needs=()),
    "lepton_ray": Reader(title="lepton on Ray", read=_lepton_ray, needs=("ray", "deltalake")),
    "read_delta": Reader(title="ray.data.read_delta", read=_ray_data, needs=("ray", "deltalake")),
    "datafusion": Reader(title="deltalake (SQL)", read=_datafusion, needs=("deltalake", "pyarrow")),
    "deltalake": Reader(
        title="deltalake (Python)", read=_deltalake, needs=("deltalake", "pyarrow")
    ),
    "duckdb": Reader(title="DuckDB", read=_duckdb, needs=("duckdb", "duckdb_extension_delta")),
    "polars": Reader(title="Polars", read=_polars, needs=("polars", "deltalake")),
    "daft": Reader(title="Daft", read=_daft, needs=("daft", "deltalake", "pyarrow")),
}


def same_rows(found: pa.Table, case: Case, rows: Sequence[dict[str, Any]]) -> str:
    """Return what differs, or nothing; rows in any order, values whatever their exact types.

    Columns of a filter's empty answer do not count; those of an empty table do.
    """
    from collections import Counter

    if len(found) == len(rows) == 0 and case.where:
        return ""
    if len(found) == len(rows) and set(found.column_names) != set(case.columns):
        return f"columns {found.column_names}, not {case.columns}"
    ours, right = (Counter(map(_plain, r)) for r in (found.to_pylist(), rows))
    if ours == right:
        return ""
    if (n := ours.total()) != right.total():
        return f"{n} rows, not {right.total()}"
    return f"{next(iter(ours - right))!s:.200}, not {next(iter(right - ours))!s:.200}"


def _plain(value: Any) -> Any:
    """A value that compares equal however a reader represents it: maps, zones, numbers."""
    if isinstance(value, dt.datetime):
        return value.astimezone(dt.UTC).replace(tzinfo=None) if value.tzinfo else value
    if isinstance(value, dict):
        if set(value) == {"key", "value"}:
            return (_plain(value["key"]), _plain(value["value"]))
        return tuple(sorted((k, _plain(v)) for k, v in value.items()))
    if isinstance(value, list | tuple):
        return tuple(_plain(v) for v in value)
    if isinstance(value, float) and value != value:
        return "NaN"
    return value
