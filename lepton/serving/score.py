"""Batch inference: a model's answers for a whole table, by the code that answers requests."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from lepton import checkpoints, cluster, telemetry
from lepton.checkpoints import Manifest
from lepton.cluster import bounds_of
from lepton.errors import CheckpointError, ServingError
from lepton.export.restore import Predictor
from lepton.lake import Snapshot, home_of, write
from lepton.registry import ModelVersion, Registry
from lepton.serving.answers import columns_of_answers
from lepton.telemetry import Carrier


class Scorer:
    """Adds the answers to batches of rows, in a Ray Data actor. A batch is an Arrow table.

    Raises:
        CheckpointError: the checkpoint is damaged, or not the one that was registered.
    """

    def __init__(self, chosen: ModelVersion) -> None:
        import torch

        torch.set_num_threads(1)
        self._predictor = Predictor(registered(chosen))
        self._version = chosen.version

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Return the rows with ``answer_<output>`` and ``model_version`` added."""
        found = {name: value.numpy() for name, value in self._predictor(rows).items()}
        for name, column in columns_of_answers(found).items():
            rows = rows.append_column(name, column)
        version: Any = pa.repeat(pa.scalar(self._version, pa.int64()), len(rows))
        return rows.append_column("model_version", version)


def score(
    model: ModelVersion | str,
    rows: Snapshot,
    uri: str | os.PathLike[str],
    *,
    version: int | str = "champion",
    workers: int | tuple[int, int] = 1,
    batch_size: int = 1024,
    txn: tuple[str, int] | None = None,
    home: str | os.PathLike[str] | None = None,
    trace: Carrier | None = None,
) -> Snapshot:
    """Answer every row of a table on the cluster and append the answers to another table.

    Args:
        model: what :func:`lepton.register` returned, or a model's name with ``version``.
        rows: what to answer; its ``where`` and ``select`` hold. All its columns are kept.
        uri: the table of answers; made when it is not there yet.
        version: number, role or alias, with a name.
        workers: actors that answer: a number, or (fewest, most).
        batch_size: rows a net is asked at once.
        txn: (application id, version) of :func:`lepton.write`: a job that is run again after it
            died adds nothing twice.
        home: where the registry is.
        trace: the span to run under.

    Returns:
        The snapshot that holds them: the columns given, ``answer_<output>`` for each output, and
        ``model_version``.

    Raises:
        ServingError: a column that the model takes is missing, or one would be written twice.
        CheckpointError: the checkpoint is damaged, or not the one that was registered.
        LakeError: the answers do not fit the table at ``uri``.
    """
    fewest, most = bounds_of("workers", workers)
    root = home_of(home)
    registry = Registry(f"{root}/registry")
    named = (model.model, model.version) if isinstance(model, ModelVersion) else (model, version)
    chosen = registry.version(*named)
    _check(chosen, rows)
    registered(chosen)
    parent = trace or Carrier("", f"{root}/traces")
    about: Mapping[str, Any] = {"lepton.model": chosen.model, "lepton.version": chosen.version}
    links = [str(chosen.lineage.get("traceparent", ""))]
    with telemetry.span("lepton.score", parent, attributes=about, links=links) as span:
        cluster.connect()
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        answered: Any = rows.to_dataset().map_batches(
            Scorer,
            fn_constructor_args=(chosen,),
            batch_format="pyarrow",
            batch_size=batch_size,
            concurrency=(fewest, most),
        )
        written = write(answered, uri, txn=txn)
        span.set(lepton_table=str(written))
    return written


def registered(chosen: ModelVersion) -> Manifest:
    """Return a version's manifest.

    Raises:
        CheckpointError: there is none, or not the one that was registered.
    """
    manifest = checkpoints.load(chosen.checkpoint)
    if manifest.sha256 != chosen.manifest_sha256:
        raise CheckpointError(
            f"checkpoint {chosen.checkpoint} is not the one registered as {chosen.model} version "
            f"{chosen.version}: its manifest has changed; register it again"
        )
    return manifest


def _check(chosen: ModelVersion, rows: Snapshot) -> None:
    signature = chosen.signature
    named = f"{chosen.model} version {chosen.version}"
    missing = [i["name"] for i in signature["inputs"] if i["name"] not in rows.schema.names]
    if missing:
        raise ServingError(f"{named} takes columns {missing}, which {rows} does not have")
    added = [*(f"answer_{o['name']}" for o in signature["outputs"]), "model_version"]
    twice = [name for name in added if name in rows.schema.names]
    if twice:
        raise ServingError(f"{rows} has columns {twice} already: leave them out with select()")
