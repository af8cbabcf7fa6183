"""A run as OpenLineage events (https://openlineage.io/spec/2-0-2/OpenLineage.json). Pure.

A START event and, of a run that is done, a COMPLETE event. Both name the tables read, at their
Delta versions; what came out of it is in the last one. A run's id follows from its trace and its
name, so that events sent twice are of one run.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

SPEC = "https://openlineage.io/spec"
EVENT = f"{SPEC}/2-0-2/OpenLineage.json#/$defs/RunEvent"
_FACETS = {
    "version": "1-0-1/DatasetVersionDatasetFacet",
    "storage": "1-0-1/StorageDatasetFacet",
    "schema": "1-2-0/SchemaDatasetFacet",
    "jobType": "2-0-4/JobTypeJobFacet",
    "processing_engine": "1-1-1/ProcessingEngineRunFacet",
    "tags": "1-0-0/TagsRunFacet",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """What a run read or made.

    Attributes:
        namespace, name: as the specification's naming has them.
        version: of it.
        storage: its format, such as delta, or empty.
        fields: column names to types, where they are known.
    """

    namespace: str
    name: str
    version: str
    storage: str = ""
    fields: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """A run with what it read and made.

    Attributes:
        run: its name. trace_id: of its trace. version: lepton's.
        began, ended: Unix seconds; ``ended`` is None while it is not done.
        tags: further facts, such as the number of steps.
    """

    run: str
    namespace: str
    trace_id: str
    version: str
    began: float
    ended: float | None
    inputs: Sequence[Dataset] = ()
    outputs: Sequence[Dataset] = ()
    tags: Mapping[str, str] = field(default_factory=dict[str, str])


def dataset_at(uri: str, version: str, **more: Any) -> Dataset:
    """Return a dataset by its location: a path's namespace is ``file``, a URL's its host."""
    parts = urlsplit(uri)
    if parts.scheme in ("", "file"):
        return Dataset(namespace="file", name=parts.path or uri, version=version, **more)
    namespace = f"{parts.scheme}://{parts.netloc}"
    return Dataset(namespace=namespace, name=parts.path.strip("/"), version=version, **more)


def events(lineage: Lineage) -> list[dict[str, Any]]:
    """Return the events, in order, as what JSON can hold."""
    producer = f"urn:lepton:{lineage.version}"
    found = [_event(lineage, producer, "START", lineage.began, ())]
    if lineage.ended is not None:
        ended = max(lineage.began, lineage.ended)
        found.append(_event(lineage, producer, "COMPLETE", ended, lineage.outputs))
    return found


def _event(
    lineage: Lineage, producer: str, kind: str, at: float, outputs: Sequence[Dataset]
) -> dict[str, Any]:
    tags = {"lepton.trace_id": lineage.trace_id, **lineage.tags}
    listed = [{"key": k, "value": v, "source": "LEPTON"} for k, v in tags.items()]
    engine = {"name": "lepton", "version": lineage.version}
    kept = {"processingType": "BATCH", "integration": "LEPTON", "jobType": "TRAINING"}
    run_id = uuid.uuid5(uuid.NAMESPACE_URL, f"lepton:{lineage.trace_id}:{lineage.run}")
    return {
        "eventType": kind,
        "eventTime": datetime.fromtimestamp(at, tz=UTC).isoformat(timespec="milliseconds"),
        "producer": producer,
        "schemaURL": EVENT,
        "run": {
            "runId": str(run_id),
            "facets": {
                "processing_engine": _facet("processing_engine", producer, **engine),
                "tags": _facet("tags", producer, tags=listed),
            },
        },
        "job": {
            "namespace": lineage.namespace,
            "name": lineage.run,
            "facets": {"jobType": _facet("jobType", producer, **kept)},
        },
        "inputs": [_dataset(d, producer) for d in lineage.inputs],
        "outputs": [_dataset(d, producer) for d in outputs],
    }


def _dataset(dataset: Dataset, producer: str) -> dict[str, Any]:
    facets = {"version": _facet("version", producer, datasetVersion=dataset.version)}
    if dataset.storage:
        storage = {"storageLayer": dataset.storage, "fileFormat": "parquet"}
        facets["storage"] = _facet("storage", producer, **storage)
    if dataset.fields:
        fields = [{"name": n, "type": t} for n, t in dataset.fields.items()]
        facets["schema"] = _facet("schema", producer, fields=fields)
    return {"namespace": dataset.namespace, "name": dataset.name, "facets": facets}


def _facet(facet: str, producer: str, /, **fields: Any) -> dict[str, Any]:
    path, _, kind = _FACETS[facet].partition("/")
    url = f"{SPEC}/facets/{path}/{kind}.json#/$defs/{kind}"
    return {"_producer": producer, "_schemaURL": url, **fields}
