"""A run's OpenLineage events, from what its home holds, to a file or to a receiver."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

import lepton
from lepton.errors import LeptonError
from lepton.lake import home_of
from lepton.registry import Registry
from lepton.report.openlineage import Dataset, Lineage, dataset_at, events
from lepton.training import Run

ENDPOINT = "/api/v1/lineage"
PATIENCE_S = 10.0


def lineage_of(run: Run, home: str | None = None) -> Lineage:
    """Return what a run read and made: checkpoints, and model versions registered from it.

    The namespace is ``$OPENLINEAGE_NAMESPACE``, by default ``lepton``.
    """
    body: dict[str, Any] = json.loads((Path(run.folder) / "run.json").read_text())
    history = run.history()
    namespace = os.environ.get("OPENLINEAGE_NAMESPACE", "lepton")
    times: list[int] = [a.time_ns for a, _ in run.attempts]
    done = (Path(run.folder) / "done.json").is_file()
    last = [t / 1e6 for t in history["time"].to_numpy().astype("int64").tolist()[-1:]]
    return Lineage(
        run=run.name,
        namespace=namespace,
        trace_id=run.trace_id,
        version=lepton.__version__,
        began=min([float(body["time"]), *(t / 1e9 for t in times)]),
        ended=(last or [float(body["time"])])[0] if done else None,
        inputs=_inputs(run, body),
        outputs=_outputs(run, namespace, home),
        tags={"lepton.steps": str(len(history)), "lepton.steps_replayed": str(run.replayed)},
    )


def send(lineage: Lineage, target: str) -> int:
    """Post each event to a URL, or write all to a file, one JSON line each; return how many.

    A URL without a path gets the receivers' usual one, ``/api/v1/lineage``. A bearer token is sent
    where ``$OPENLINEAGE_API_KEY`` is set.

    Raises:
        LeptonError: the file cannot be written, or the receiver did not take an event.
    """
    bodies = [json.dumps(e) for e in events(lineage)]
    if urlsplit(target).scheme in ("http", "https"):
        _post(bodies, target)
        return len(bodies)
    try:
        Path(target).write_text("".join(f"{b}\n" for b in bodies), encoding="utf-8")
    except OSError as e:
        raise LeptonError(f"cannot write {target}: {e.strerror}; name a file in a folder") from e
    return len(bodies)


def _post(bodies: list[str], target: str) -> None:
    url = target if urlsplit(target).path.strip("/") else target.rstrip("/") + ENDPOINT
    key = os.environ.get("OPENLINEAGE_API_KEY")
    headers = {"content-type": "application/json"}
    headers |= {"authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(timeout=PATIENCE_S, headers=headers) as client:
        for number, body in enumerate(bodies, 1):
            try:
                client.post(url, content=body).raise_for_status()
            except httpx.HTTPError as e:
                raise LeptonError(
                    f"{url} did not take event {number} of {len(bodies)}: {e}; sending all of them "
                    "again is safe, they keep their run id"
                ) from e


def _inputs(run: Run, body: dict[str, Any]) -> list[Dataset]:
    found: list[Dataset] = []
    made = run.checkpoints
    lineage: dict[str, Any] = dict(made[-1].lineage) if made else {}
    for source in body.get("tables") or [body["table"]]:
        uri, _, version = str(source).rpartition("@")
        fields = dict(lineage.get("types") or {}) if lineage.get("table") == uri else {}
        found.append(dataset_at(uri, version, storage="delta", fields=fields))
    return found


def _outputs(run: Run, namespace: str, home: str | None) -> list[Dataset]:
    found = [dataset_at(m.uri, m.sha256) for m in run.checkpoints[-1:]]
    registry = Registry(f"{home_of(home)}/registry")
    for model in registry.models():
        for number, entry in sorted(registry.state(model).versions.items()):
            if entry.lineage.get("run") == run.name:
                found.append(Dataset(namespace=namespace, name=model, version=str(number)))
    return found
