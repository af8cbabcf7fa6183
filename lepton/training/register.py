"""``lepton.register``: a run's checkpoint becomes an immutable, numbered model version."""

from __future__ import annotations

import os
from collections.abc import Mapping

from lepton import checkpoints, telemetry
from lepton.checkpoints import Manifest
from lepton.errors import CheckpointError
from lepton.lake import home_of
from lepton.registry import ModelVersion, Registry
from lepton.telemetry import Carrier
from lepton.training.evaluation import Evaluation
from lepton.training.run import Run


def register(
    run: Run,
    name: str,
    *,
    metrics: Mapping[str, float] | Evaluation | None = None,
    checkpoint: Manifest | None = None,
    tags: Mapping[str, str] | None = None,
    home: str | os.PathLike[str] | None = None,
    trace: Carrier | None = None,
) -> ModelVersion:
    """Record a checkpoint of a run as the next version of a model.

    Args:
        run: the run that made it.
        name: the model's name.
        metrics: figures to gate on; an evaluation says which rows they were measured on, too.
        checkpoint: which of the run's; default the newest.
        tags: free text pairs.
        home: where the registry is.
        trace: the span to run under; default the run's.

    Raises:
        CheckpointError: the checkpoint is damaged, of another run, or cannot be served; or the
            evaluation is of another one.
        RegistryError: the registry cannot be written.
    """
    manifest = checkpoint or run.checkpoint
    if manifest.lineage.get("run") != run.name:
        raise CheckpointError(
            f"checkpoint {manifest.uri} is of run {manifest.lineage.get('run')!r}, not of "
            f"{run.name!r}: register it with its own run"
        )
    if isinstance(metrics, Evaluation) and metrics.checkpoint != manifest.uri:
        raise CheckpointError(
            f"the evaluation on {metrics.table} is of checkpoint {metrics.checkpoint}, not of "
            f"{manifest.uri}: evaluate that one, or register the other"
        )
    checkpoints.verify(manifest)
    if manifest.signature is None:
        raise CheckpointError(f"checkpoint {manifest.uri} cannot serve: {manifest.program_error}")
    root = home_of(home)
    judged = isinstance(metrics, Evaluation)
    figures = metrics.metrics if judged else metrics or {}
    parent = trace or Carrier(run.traceparent, f"{root}/traces")
    described = {"lepton.model": name, "lepton.checkpoint": manifest.uri}
    links = [manifest.traceparent]
    with telemetry.span("lepton.register", parent, attributes=described, links=links) as span:
        version = Registry(f"{root}/registry").register(
            name,
            checkpoint=manifest.uri,
            manifest_sha256=manifest.sha256,
            lineage={
                **manifest.lineage,
                "cursor": dict(manifest.cursor),
                "step": manifest.step,
                "traceparent": manifest.traceparent,
            },
            metrics={**manifest.metrics, **figures},
            measured={metrics.table: figures} if judged else {},
            signature=dict(manifest.signature),
            size=manifest.size,
            tags=dict(tags or {}),
            trace_id=span.carrier.trace_id,
        )
        span.set(lepton_version=version.version)
    return version
