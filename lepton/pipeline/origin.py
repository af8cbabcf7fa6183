"""An answer's way back: from a request's id to the rows that its weights were made of.

Each stage is looked up where it is kept, not repeated from hearsay: the inference log, the
registry, the checkpoint's manifest, the run's folder, the evaluations, the tables' logs. A stage
that is gone or changed says so and leaves the others as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow.compute as pc

from lepton import checkpoints
from lepton.errors import CheckpointError, LakeError, LeptonError, RegistryError, TrainingError
from lepton.lake import home_of, table
from lepton.monitoring import count_answers
from lepton.pipeline.tracing import answer_rows, logs_of
from lepton.registry import ModelVersion, Registry
from lepton.training import load_run


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage of the way.

    Attributes:
        kind: answer, model, checkpoint, run, evaluation or table.
        name: which one.
        where: the table, file or folder that says so.
        facts: about it, of JSON's types.
        problem: what is missing or not as it was, and what to do; else empty.
    """

    kind: str
    name: str
    where: str
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    problem: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The way back of one answer, from the answer to the tables."""

    request_id: str
    stages: Sequence[Stage]

    @property
    def whole(self) -> bool:
        """Whether every stage is there as it was."""
        return not any(s.problem for s in self.stages)

    def to_json(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        stages = [
            {"stage": s.kind, "name": s.name, "where": s.where, **s.facts, "problem": s.problem}
            for s in self.stages
        ]
        return {"request_id": self.request_id, "whole": self.whole, "stages": stages}


def why(request_id: str, home: str | None = None) -> Origin:
    """Return where an answer came from.

    Raises:
        LeptonError: no inference log of this home has the request.
    """
    root = home_of(home)
    rows = answer_rows(request_id, root)
    if not rows:
        raise LeptonError(_unknown(request_id, root))
    stages = [_answer(rows)]
    row = [r for r in rows if r["variant"] == rows[0]["variant"]][-1]
    registry = Registry(f"{root}/registry")
    try:
        entry = registry.version(row["model"], row["version"])
    except RegistryError as e:
        name = f"{row['model']} version {row['version']}"
        missing = Stage(kind="model", name=name, where=registry.uri, problem=str(e))
        return Origin(request_id=request_id, stages=[*stages, missing])
    stages += [_model(entry, registry), _checkpoint(entry), _run(entry, root)]
    stages += _evaluations(entry, root)
    stages += [_table(source, entry) for source in sources_of(entry.lineage)]
    return Origin(request_id=request_id, stages=stages)


def sources_of(lineage: Mapping[str, Any]) -> list[str]:
    """Return ``uri@version`` of each table that weights were made of."""
    first = f"{lineage.get('table')}@{lineage.get('table_version')}"
    return [str(t) for t in lineage.get("tables") or [first]]


def _unknown(request_id: str, root: str) -> str:
    held = {log.name: count_answers(log.name, root) for log in logs_of(root)}
    if not held:
        return (
            f"no request {request_id!r}: {root}/answers holds no inference log yet; serve a model "
            "with this home, or name another one with --home"
        )
    counts = ", ".join(f"{n} of {model}" for model, n in held.items())
    return (
        f"no request {request_id!r} in the inference logs of {root}/answers: they hold {counts}; "
        "an answer's id is its `id`, and the log has it within a second; list them with "
        f"lepton.table('{root}/answers/{next(iter(held))}').select(['request_id', 'time'])"
    )


def _answer(rows: Sequence[Mapping[str, Any]]) -> Stage:
    own = [r for r in rows if r["variant"] == rows[0]["variant"]]
    row = own[-1]
    facts: dict[str, Any] = {
        "time": row["time"].isoformat(timespec="milliseconds"),
        "status": row["status"],
        "latency_ms": round(row["latency_ms"], 3),
        "variant": row["variant"],
        "trace_id": row["trace_id"],
    }
    shadows = sorted({r["version"] for r in rows if r["variant"] == "shadow"} - {row["version"]})
    if shadows:
        facts["shadow_versions"] = shadows
    if len(own) > 1:
        facts["answers_of_this_id"] = len(own)
    return Stage(kind="answer", name=row["request_id"], where=row["log"], facts=facts)


def _model(entry: ModelVersion, registry: Registry) -> Stage:
    state = registry.state(entry.model)
    pointer = state.pointer
    roles = {
        **state.aliases,
        **{r: getattr(pointer, r) for r in ("champion", "previous", "canary", "shadow")},
    }
    return Stage(
        kind="model",
        name=f"{entry.model} version {entry.version}",
        where=registry.uri,
        facts={
            "registered": entry.created.isoformat(timespec="seconds"),
            "by": entry.actor,
            "now": sorted(r for r, number in roles.items() if number == entry.version),
            "metrics": dict(entry.metrics),
        },
    )


def _checkpoint(entry: ModelVersion) -> Stage:
    lineage = entry.lineage
    facts: dict[str, Any] = {
        "step": lineage.get("step"),
        "epoch": dict(lineage.get("cursor") or {}).get("epoch"),
        "sha256": entry.manifest_sha256,
        "bytes": entry.size,
    }

    def look() -> str:
        found = checkpoints.load(entry.checkpoint).sha256
        if found == entry.manifest_sha256:
            return ""
        return f"the manifest has changed since it was registered: its hash is {found} now"

    where = entry.checkpoint
    name = where.rpartition("/")[2].removesuffix(".json")
    return Stage(kind="checkpoint", name=name, where=where, facts=facts, problem=_tried(look))


def _run(entry: ModelVersion, root: str) -> Stage:
    lineage = entry.lineage
    name = str(lineage.get("run"))
    facts: dict[str, Any] = {k: lineage.get(k) for k in ("trace_id", "code", "seed", "batch_size")}

    def look() -> str:
        run = load_run(name, root)
        lives = run.attempts
        facts["world_sizes"] = [a.world_size for a, _ in lives]
        facts["steps_replayed"] = run.replayed
        return ""

    problem = _tried(look)
    return Stage(kind="run", name=name, where=f"{root}/runs/{name}", facts=facts, problem=problem)


def _evaluations(entry: ModelVersion, root: str) -> list[Stage]:
    """Every evaluation of that checkpoint, the newest first."""
    uri = f"{root}/evaluations"
    try:
        log = table(uri)
        rows = log.where(pc.field("checkpoint") == entry.checkpoint).to_arrow()
    except LakeError:
        return []
    plain = [c for c in rows.column_names if c not in ("id", "run", "checkpoint", "confusion")]
    stages: list[Stage] = []
    for row in rows.select(plain).to_pylist():
        row["time"] = row["time"].isoformat(timespec="seconds")
        stages.append(Stage(kind="evaluation", name=f"on {row.pop('table')}", where=uri, facts=row))
    return sorted(stages, key=lambda s: s.facts["time"], reverse=True)


def _table(source: str, entry: ModelVersion) -> Stage:
    uri, _, version = source.rpartition("@")
    facts: dict[str, Any] = {"filter": entry.lineage.get("filter")}

    def look() -> str:
        found = table(uri, version=int(version))
        facts["files"] = len(found.files())
        facts["rows"] = found.count_rows()
        return ""

    problem = _tried(look)
    return Stage(kind="table", name=source, where=uri, facts=facts, problem=problem)


def _tried(look: Callable[[], str]) -> str:
    """What is wrong, as the look or its error says."""
    try:
        return look()
    except (CheckpointError, LakeError, TrainingError, OSError, ValueError) as e:
        return str(e)
