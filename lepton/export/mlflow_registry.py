"""Versions to and from MLflow's model registry: whole checkpoints, with all that is said of them.

What goes over is the checkpoint's manifest and files as they are, so that a version that comes back
is the same, byte for byte. MLflow is asked through its client alone; install ``lepton[mlflow]``.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lepton import checkpoints
from lepton.checkpoints import Manifest
from lepton.errors import CheckpointError, RegistryError
from lepton.lake import home_of
from lepton.registry import ModelState, ModelVersion, Registry

ROLES = ("champion", "previous")
FOLDER = "checkpoint"
SAID = "version.json"
MARK = "lepton.manifest_sha256"
LONGEST_TAG = 5000


def export_version(
    model: ModelVersion | str,
    version: int | str = "champion",
    *,
    tracking_uri: str | None = None,
    home: str | os.PathLike[str] | None = None,
) -> Any:
    """Copy a version to MLflow's registry, as the next version of the model of that name there.

    Its metrics, lineage, tags and note go with it, and its aliases, ``champion`` too. A version
    that is there already gets its tags and aliases anew.

    Args:
        model: a version, or a model's name with ``version``.
        version: number, role or alias, with a name.
        tracking_uri: of MLflow; default what MLflow's own settings say.
        home: where the registry is.

    Returns:
        MLflow's model version.

    Raises:
        RegistryError: MLflow is not installed, or does not take it.
        CheckpointError: the checkpoint is damaged, or another one by now.
    """
    registry = Registry(f"{home_of(home)}/registry")
    if isinstance(model, ModelVersion):
        model, version = model.model, model.version
    entry = registry.version(model, version)
    manifest = checkpoints.load(entry.checkpoint)
    if manifest.sha256 != entry.manifest_sha256:
        raise CheckpointError(
            f"checkpoint {entry.checkpoint} is not the one registered as {model} version "
            f"{entry.version}: its manifest has changed"
        )
    checkpoints.verify(manifest)
    client, refused = _client(tracking_uri)
    try:
        there = _find(client, model, manifest.sha256) or _create(client, entry, manifest)
        for name, value in entry.tags.items():
            client.set_model_version_tag(model, there.version, name, value[:LONGEST_TAG])
        client.update_model_version(model, there.version, entry.note)
        for alias in _aliases(registry.state(model), entry.version):
            client.set_registered_model_alias(model, alias, there.version)
        return client.get_model_version(model, there.version)
    except refused as e:
        raise RegistryError(f"MLflow does not take {model} version {entry.version}: {e}") from e


def import_version(
    model: str,
    version: int | str,
    *,
    tracking_uri: str | None = None,
    home: str | os.PathLike[str] | None = None,
) -> ModelVersion:
    """Copy a version that lepton exported from MLflow's registry into one's own, as the next one.

    A version that is here already is returned as it is.

    Args:
        model: its name, there and here.
        version: MLflow's number of it, or an alias there.
        tracking_uri: of MLflow; default what MLflow's own settings say.
        home: where the registry is; the checkpoint goes to ``imported/`` below it.

    Raises:
        RegistryError: MLflow is not installed, or has no such version; or it is none of lepton's,
            and so nothing here could serve it.
        CheckpointError: what came is damaged.
    """
    root = home_of(home)
    if "://" in root:
        raise RegistryError(f"cannot import to {root}: name a home on this machine")
    registry = Registry(f"{root}/registry")
    client, refused = _client(tracking_uri)
    try:
        number = str(version)
        if not number.isdigit():
            number = client.get_model_version_by_alias(model, number).version
        there = client.get_model_version(model, number)
        digest = dict(there.tags).get(MARK)
        if digest is None:
            raise RegistryError(
                f"MLflow's {model} version {number} was not exported by lepton: its program is not "
                "there, only what MLflow's own servers can run"
            )
        for entry in registry.state(model).versions.values():
            if entry.manifest_sha256 == digest:
                return entry
        with tempfile.TemporaryDirectory(prefix="lepton-mlflow-") as scratch:
            folder = Path(client.download_artifacts(there.run_id, FOLDER, scratch))
            said = json.loads((folder / SAID).read_text())
            manifest = _kept(folder, Path(root) / "imported" / model, digest)
    except (refused, OSError, ValueError) as e:
        raise RegistryError(f"MLflow's {model} version {version} cannot be had: {e}") from e
    return registry.register(
        model,
        checkpoint=manifest.uri,
        manifest_sha256=digest,
        metrics=said["metrics"],
        lineage={**said["lineage"], "imported_from": f"models:/{model}/{number}"},
        signature=said["signature"],
        size=manifest.size,
        measured=said["measured"],
        note=there.description or "",
        tags=said["tags"],
    )


def _client(tracking_uri: str | None) -> tuple[Any, Any]:
    """MLflow's client, and what it raises."""
    try:
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
        from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise RegistryError("MLflow is not installed: pip install 'lepton[mlflow]'") from e
    made: Any = MlflowClient
    return made(tracking_uri, tracking_uri), MlflowException


def _find(client: Any, model: str, digest: str) -> Any | None:
    found = client.search_model_versions(f"name = '{model}'")
    return next((v for v in found if dict(v.tags).get(MARK) == digest), None)


def _create(client: Any, entry: ModelVersion, manifest: Manifest) -> Any:
    """Log the checkpoint as artifacts of a run, then make it a version."""
    model = entry.model
    if not client.search_registered_models(f"name = '{model}'"):
        client.create_registered_model(model)
    name = f"lepton/{model}"
    experiment = client.get_experiment_by_name(name)
    where = experiment.experiment_id if experiment else client.create_experiment(name)
    run = client.create_run(where, run_name=f"{model} version {entry.version}").info.run_id
    for key, value in _shown(entry.lineage).items():
        client.log_param(run, key, value)
    for key, value in entry.metrics.items():
        client.log_metric(run, key, value)
    with tempfile.TemporaryDirectory(prefix="lepton-mlflow-") as scratch:
        whole = Path(scratch)
        (whole / manifest.name).write_bytes(manifest.storage.read(manifest.name))
        for file in manifest.files:
            place = whole / manifest.place(file)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(manifest.path(file).resolve())
        client.log_artifacts(run, scratch, FOLDER)
    said = {k: v for k, v in asdict(entry).items() if k != "created"}
    client.log_text(run, json.dumps(said), f"{FOLDER}/{SAID}")
    client.set_terminated(run)
    source = f"{client.get_run(run).info.artifact_uri}/{FOLDER}"
    tags = {MARK: manifest.sha256, "lepton.version": str(entry.version)}
    return client.create_model_version(model, source, run, tags=tags)


def _shown(lineage: Mapping[str, Any]) -> dict[str, str]:
    """What of the lineage is short enough to be a parameter."""
    plain = {k: v for k, v in lineage.items() if isinstance(v, str | int | float) and v != ""}
    return {k: str(v) for k, v in plain.items() if len(str(v)) <= 500}


def _aliases(state: ModelState, version: int) -> list[str]:
    roles = [role for role in ROLES if getattr(state.pointer, role) == version]
    return [*roles, *(alias for alias, number in state.aliases.items() if number == version)]


def _kept(folder: Path, target: Path, digest: str) -> Manifest:
    """Move a checkpoint that came to where it stays; the manifest last, as when it was written."""
    (came,) = (p for p in folder.glob("*.json") if p.name != SAID)
    manifest = checkpoints.load(came)
    if manifest.sha256 != digest:
        raise CheckpointError(
            f"the checkpoint that came for {target.name} is another one than was exported: its "
            "manifest has changed"
        )
    checkpoints.verify(manifest)
    for file in manifest.files:
        place = target / digest[:16] / manifest.place(file)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(manifest.path(file).read_bytes())
    stays = target / digest[:16] / came.name
    stays.write_bytes(came.read_bytes())
    return checkpoints.load(stays)
