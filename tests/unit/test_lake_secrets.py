"""What opens a store is in nothing that people or collectors see: reprs, errors, logs, spans."""

import dataclasses
import logging
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import lepton
from lepton.errors import LakeError
from lepton.lake.files import write_files
from lepton.lake.journal import publish
from lepton.lake.maintenance import checkpoint, optimize, restore, vacuum
from lepton.lake.ray_sink import _Files
from lepton.lake.replacement import Target
from lepton.lake.rewrite import Change, Source
from lepton.lake.rules import Rules
from lepton.lake.source import Place, Rows
from lepton.telemetry import Carrier

SECRETS = ("open-sesame", "someone-special", "token-of-mine")
OPTIONS = {
    "AWS_ENDPOINT_URL": "http://127.0.0.1:9",  # the port of "discard": nobody listens
    "AWS_ACCESS_KEY_ID": "someone-special",
    "AWS_SECRET_ACCESS_KEY": "open-sesame",
    "AWS_SESSION_TOKEN": "token-of-mine",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
    "max_retries": "0",
    "retry_timeout": "1s",
    "timeout": "1s",
}
URI = "s3://bucket/t"
ROWS = pa.table({"k": [1]})


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing answers, so nothing is worth asking again."""
    monkeypatch.setattr("lepton.lake.storage.TRIES", 1)


CALLS: dict[str, Callable[[Carrier], Any]] = {
    "table": lambda _: lepton.table(URI, storage_options=OPTIONS),
    "write": lambda _: lepton.write(ROWS, URI, storage_options=OPTIONS),
    "merge": lambda _: lepton.write(ROWS, URI, mode="merge", key="k", storage_options=OPTIONS),
    "files": lambda _: write_files(ROWS, URI, (), OPTIONS),
    "commit": lambda _: publish(URI, 0, [], OPTIONS),
    "optimize": lambda at: optimize(URI, storage_options=OPTIONS, trace=at),
    "vacuum": lambda at: vacuum(URI, storage_options=OPTIONS, trace=at),
    "checkpoint": lambda at: checkpoint(URI, storage_options=OPTIONS, trace=at),
    "restore": lambda at: restore(URI, 0, storage_options=OPTIONS, trace=at),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_error_log_or_span_tells(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises((LakeError, OSError)) as error:
        CALLS[name](Carrier("", str(tmp_path)))
    told = [str(error.value), repr(error.value), "".join(traceback.format_exception(error.value))]
    told += [repr(vars(pickle.loads(pickle.dumps(error.value))))]
    told += [caplog.text, *(r.getMessage() for r in caplog.records)]
    told += [p.read_text() for p in tmp_path.rglob("*") if p.is_file()]
    assert not [text for text in told if any(secret in text for secret in SECRETS)]


def test_no_repr_tells(tmp_path: Path) -> None:
    version = lepton.write(ROWS, tmp_path / "t").load()
    rules = Rules(what="t", schema=ROWS.schema, partition_columns=(), constraints={})
    place = Place(path=URI, options=OPTIONS)
    snapshot = dataclasses.replace(
        lepton.table(tmp_path / "t"), options=tuple(sorted(OPTIONS.items()))
    )
    things: list[Any] = [
        place,
        Rows(ROWS, place),
        Target(version=version, rules=rules, options=OPTIONS, job=""),
        Change(operation="MERGE", where=None, txn=None, uri=URI, options=OPTIONS),
        Source(
            blocks=[],
            rows=np.zeros(0, np.int64),
            sizes=[],
            keys=None,
            fetch=lambda block: block,
            run=lambda _, calls: calls,
        ),
        _Files(rules, URI, OPTIONS, "job"),
        snapshot,
        snapshot.where("k > 0"),
        snapshot.load(),
    ]
    told = [f(thing) for thing in things for f in (repr, str)]
    assert not [text for text in told if any(secret in text for secret in SECRETS)]
