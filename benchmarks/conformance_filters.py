"""Tables on which filters lose rows, timestamps move, and tables that most readers must refuse."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pyarrow as pa

from benchmarks.conformance_log import Log, column, metadata, protocol
from benchmarks.conformance_tables import Made, Rows, made, table_of

I64, STR, F64 = pa.int64(), pa.string(), pa.float64()


@made("filters")
def statistics_missing(root: Path) -> Made:
    """Files with no statistics, with a count only, with nulls only, and with all."""
    log = Log(root)
    claims = [None, {}, {"nullCount": {"x": 0}}]
    claims.append({"minValues": {"x": 3}, "maxValues": {"x": 3}, "nullCount": {"x": 0}})
    adds = [
        log.add(f"{n}.parquet", table_of({"x": I64}, x=[n]), stats=stats)
        for n, stats in enumerate(claims)
    ]
    log.commit(protocol(reader=1, writer=2), metadata([column("x", "long")]), *adds)
    expected: Rows = [{"x": n} for n in range(4)]
    where = (
        (("x", ">=", 1), expected[1:]),
        (("x", "null", None), []),
        (("x", "=", 0), expected[:1]),
    )
    return Made(feature="files without min and max", rows=expected, where=where, count=True)


@made("filters")
def statistics_cut(root: Path) -> Made:
    """Writers cut long strings, and timestamps to milliseconds: the bounds are not exact."""
    log = Log(root)
    text, moment = "x" * 40, dt.datetime(2020, 1, 1, 0, 0, 0, 999_999, dt.UTC)
    rows = table_of({"s": STR, "t": pa.timestamp("us", "UTC")}, s=[text], t=[moment])
    low = {"s": "x" * 32, "t": "2020-01-01T00:00:00.999Z"}
    high = low | {"s": low["s"] + "\x7f"}
    stats = {"minValues": low, "maxValues": high, "nullCount": {"s": 0, "t": 0}}
    log.commit(
        protocol(reader=1, writer=2),
        metadata([column("s", "string"), column("t", "timestamp")]),
        log.add("1.parquet", rows, stats=stats),
    )
    expected: Rows = [{"s": text, "t": moment}]
    where = ((("s", ">", "x" * 36), expected), (("t", "=", moment), expected))
    return Made(feature="statistics that were cut", rows=expected, where=where)


@made("filters")
def statistics_null(root: Path) -> Made:
    """A file of nulls, one of some, one of none; comparisons keep no null."""
    log = Log(root)
    columns: list[list[int | None]] = [[None, None], [1, None], [2, 3]]
    adds = []
    for n, values in enumerate(columns):
        known = [v for v in values if v is not None]
        stats = {"nullCount": {"x": len(values) - len(known)}}
        if known:
            stats |= {"minValues": {"x": min(known)}, "maxValues": {"x": max(known)}}
        adds.append(log.add(f"{n}.parquet", table_of({"x": I64}, x=values), stats=stats))
    log.commit(protocol(reader=1, writer=2), metadata([column("x", "long")]), *adds)
    expected: Rows = [{"x": v} for values in columns for v in values]
    where = (
        (("x", "<>", 1), expected[4:]),
        (("x", "null", None), [{"x": None}] * 3),
        (("x", "<", 3), [{"x": 1}, {"x": 2}]),
    )
    return Made(feature="nulls", rows=expected, where=where)


@made("timestamps")
def timestamp_units(root: Path) -> Made:
    """Files may store milliseconds, or another zone's label; the instant is the same."""
    log = Log(root)
    moment = dt.datetime(2020, 5, 17, 12, 30, tzinfo=dt.UTC)
    columns = metadata([column("t", "timestamp"), column("n", "timestamp_ntz")])
    adds = [
        log.add(
            f"{unit}.parquet",
            table_of(
                {"t": pa.timestamp(unit, zone), "n": pa.timestamp(unit)},
                t=[moment],
                n=[moment.replace(tzinfo=None)],
            ),
        )
        for unit, zone in (("ms", "UTC"), ("us", "+02:00"), ("ns", "UTC"))
    ]
    log.commit(protocol(["timestampNtz"]), columns, *adds)
    row = {"t": moment, "n": moment.replace(tzinfo=None)}
    where = ((("t", "=", moment), [row] * 3),)
    return Made(feature="other units and zones in files", rows=[row] * 3, where=where)


@made("log")
def log_absolute_path(root: Path) -> Made:
    """A shallow clone's log names files of another table by their full URI."""
    log = Log(root)
    rows = table_of({"x": I64}, x=[1, 2])
    file = root.parent / "elsewhere of x" / "1.parquet"
    add = log.add(f"../{file.parent.name}/1.parquet", rows, path=file.as_uri())
    log.commit(protocol(reader=1, writer=2), metadata([column("x", "long")]), add)
    return Made(feature="absolute path of a file (shallow clone)", rows=[{"x": 1}, {"x": 2}])


@made("log")
def log_unknown_actions(root: Path) -> Made:
    """Actions and members that a reader does not know are passed over."""
    log = Log(root)
    add = log.add("1.parquet", table_of({"x": I64}, x=[1]))
    add["add"]["clusteringProvider"] = "liquid"
    features = ["domainMetadata", "rowTracking", "clustering", "appendOnly", "invariants"]
    both = {"minReaderVersion": 1, "minWriterVersion": 7, "writerFeatures": features}
    domain = {"domain": "d", "configuration": "{}", "removed": False}
    log.commit(
        {"protocol": both},
        metadata([column("x", "long")]),
        {"domainMetadata": domain},
        {"txn": {"appId": "a", "version": 1}},
        add,
    )
    return Made(feature="writer features, unknown members", rows=[{"x": 1}])


@made("refusal")
def refuse_unknown_feature(root: Path) -> Made:
    """A reader feature that nobody has: the protocol demands refusal."""
    log = Log(root)
    add = log.add("1.parquet", table_of({"x": I64}, x=[1]))
    log.commit(protocol(["lampshade"]), metadata([column("x", "long")]), add)
    return Made(feature="an unknown reader feature", rows=None, columns=["x"])


@made("refusal")
def refuse_reader_version(root: Path) -> Made:
    """A reader version that is not there yet."""
    log = Log(root)
    add = log.add("1.parquet", table_of({"x": I64}, x=[1]))
    log.commit(protocol(reader=4), metadata([column("x", "long")]), add)
    return Made(feature="an unknown reader version", rows=None, columns=["x"])


_META = b"\x01\x00\x00"  # variant metadata: version 1, no names
_SEVEN = b"\x0c\x07"  # the int8 7


@made("refusal")
def variant_plain(root: Path) -> Made:
    """A variant, not shredded: metadata and value, as they are stored, are right."""
    log = Log(root)
    kind = pa.struct({"metadata": pa.binary(), "value": pa.binary()})
    value = {"metadata": _META, "value": _SEVEN}
    add = log.add("1.parquet", table_of({"x": I64, "v": kind}, x=[1, 2], v=[value, None]))
    columns = metadata([column("x", "long"), column("v", "variant")])
    log.commit(protocol(["variantType"]), columns, add)
    return Made(feature="variant", rows=[{"x": 1, "v": value}, {"x": 2, "v": None}])


@made("refusal")
def variant_shredded(root: Path) -> Made:
    """A shredded variant: the value is in the typed member; null would be wrong."""
    log = Log(root)
    kind = pa.struct({"metadata": pa.binary(), "value": pa.binary(), "typed_value": I64})
    value = {"metadata": _META, "value": None, "typed_value": 7}
    add = log.add("1.parquet", table_of({"x": I64, "v": kind}, x=[1], v=[value]))
    columns = metadata([column("x", "long"), column("v", "variant")])
    log.commit(protocol(["variantType", "variantShredding"]), columns, add)
    right = {"metadata": _META, "value": b"\x18\x07\x00\x00\x00\x00\x00\x00\x00"}
    return Made(feature="variant, shredded", rows=[{"x": 1, "v": right}])
