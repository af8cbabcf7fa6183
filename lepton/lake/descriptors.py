"""The deletion vectors that a log names.

deltalake names no descriptor and reads every vector of a table at once. So the log's ``add``
actions are gone through once more, for this one column. Which files are live is deltalake's to
say: a live file's descriptor is that of the newest action that added it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from lepton.errors import LakeError
from lepton.lake.history import log_folder, names_of, newest_point
from lepton.lake.vectors import Vector, vector_of

pc: Any = pyarrow.compute  # its stubs know no arrays of unknown type

_COMMIT = re.compile(r"(\d{20})(?:\.(\d{20})\.compacted)?\.json")
_THREADS = 8

Descriptors = dict[str, Vector | None]


def descriptors(uri: str, number: int, options: Mapping[str, str] | None) -> Descriptors:
    """Return by decoded path the vector that the newest ``add`` gave a file, None for none.

    Paths that were removed later are among them; files of a checkpoint without a vector are not.

    Raises:
        LakeError: the log cannot be read, or names a vector in no way that the protocol knows.
    """
    store, root = log_folder(uri, options)
    found: Descriptors = {}
    try:
        names = names_of(store, root)
        point, files = newest_point(names, number)
        for file in files:
            found |= _of_checkpoint(store, f"{root}/{file}", root)
        later = _later(names, point, number)
        with ThreadPoolExecutor(_THREADS) as threads:
            for one in threads.map(partial(_of_lines, store), (f"{root}/{name}" for name in later)):
                found |= one
    except (OSError, ValueError, KeyError, pa.ArrowException) as e:
        raise LakeError(
            f"cannot read the deletion vectors' places in the log of {uri!r}@{number}: {e}; "
            "restore the log from a copy"
        ) from e
    return found


def _later(names: Sequence[str], point: int, number: int) -> list[str]:
    """The commits after a checkpoint, ascending; compacted ones for those that are gone."""
    there: dict[int, tuple[int, str]] = {}
    for name in names:
        m = _COMMIT.fullmatch(name)
        if m and int(m[1]) > point and int(m[2] or m[1]) <= number:
            last = int(m[2] or m[1])
            if int(m[1]) not in there or m[2] is None:
                there[int(m[1])] = (last, name)
    chosen: list[str] = []
    at = point + 1
    while at <= number:
        if at not in there:
            raise ValueError(f"{at:020}.json is missing")
        last, name = there[at]
        chosen.append(name)
        at = last + 1
    return chosen


def _of_lines(store: pafs.FileSystem, path: str) -> Descriptors:
    with store.open_input_stream(path) as source:
        lines = source.read().splitlines()
    adds = (json.loads(line).get("add") for line in lines if b'"add"' in line)
    return {_plain(a["path"]): _vector(a.get("deletionVector")) for a in adds if a}


def _of_checkpoint(store: pafs.FileSystem, path: str, root: str) -> Descriptors:
    """The vectors of a checkpoint, and of the files beside it that a version 2 one refers to."""
    if path.endswith(".json"):
        found = _of_lines(store, path)
        with store.open_input_stream(path) as source:
            actions = [json.loads(x) for x in source.read().splitlines() if b'"sidecar"' in x]
        beside = [str(a["sidecar"]["path"]) for a in actions if a.get("sidecar")]
    else:
        found = Descriptors()
        beside = list(_of_parquet(store, path, found))
    for name in beside:
        file = unquote(name).rpartition("/")[2]  # they are always in that one folder
        list(_of_parquet(store, f"{root}/_sidecars/{file}", found))
    return found


def _of_parquet(store: pafs.FileSystem, path: str, found: Descriptors) -> Iterator[str]:
    """Put the vectors of a checkpoint's file into ``found``; yield the sidecars that it names."""
    columns = ["add.path", "add.deletionVector", "sidecar.path"]
    with store.open_input_file(path) as source:
        for batch in pq.ParquetFile(source).iter_batches(columns=columns, use_threads=False):
            yield from _members(batch, "sidecar", "path").drop_null().to_pylist()
            vectors = _members(batch, "add", "deletionVector")
            there = pc.is_valid(_members(vectors, "storageType"))
            paths = _members(batch, "add", "path").filter(there)
            for name, one in zip(paths.to_pylist(), vectors.filter(there).to_pylist(), strict=True):
                found[_plain(name)] = vector_of(one)


def _members(batch: Any, *names: str) -> Any:
    """A column or a field in it; nulls where there is none."""
    at: Any = batch
    for name in names:
        if isinstance(at, pa.RecordBatch):
            at = at.column(name) if name in at.schema.names else pa.nulls(len(at))
        elif pa.types.is_struct(at.type) and at.type.get_field_index(name) >= 0:
            at = pc.struct_field(at, [at.type.get_field_index(name)])
        else:
            at = pa.nulls(len(at))
    return at


def _plain(path: str) -> str:
    return unquote(path) if "%" in path else path


def _vector(descriptor: Any) -> Vector | None:
    return vector_of(descriptor) if descriptor else None
