"""Runs and model versions of a home, as rows of JSON's types."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lepton.errors import LeptonError, RegistryError
from lepton.lake import home_of
from lepton.pipeline.origin import sources_of
from lepton.registry import ModelState, Registry
from lepton.registry.events import ROLES
from lepton.training import Run, load_run, outcome_of
from lepton.training.steps import effective, loss_of, replayed


def runs(home: str | None = None) -> list[dict[str, Any]]:
    """Return a row for each run, by name.

    A run whose files cannot be read has the status ``unreadable`` and says why in ``problem``.
    """
    found: list[dict[str, Any]] = []
    for path in sorted((Path(home_of(home)) / "runs").glob("*/run.json")):
        try:
            found.append(_run(load_run(path.parent.name, home), json.loads(path.read_text())))
        except (LeptonError, OSError, ValueError, KeyError, TypeError) as e:
            problem = f"{path.parent}: {e!r}; mend the file, or remove the folder"
            found.append({"run": path.parent.name, "status": "unreadable", "problem": problem})
    return found


def models(
    home: str | None = None, model: str | None = None, at: datetime | None = None
) -> list[dict[str, Any]]:
    """Return a row for each version of each model, or of one; as it was at a time.

    Raises:
        RegistryError: there is no such model.
        ValueError: the time has no time zone.
    """
    registry = Registry(f"{home_of(home)}/registry")
    there = registry.models()
    if model is not None and model not in there:
        raise RegistryError(f"no model {model!r} in {registry.uri}; it has: {there}")
    chosen = there if model is None else [model]
    states = [registry.state(m) if at is None else registry.at(m, at) for m in chosen]
    return [row for state in states for row in _versions(state)]


def _run(run: Run, body: dict[str, Any]) -> dict[str, Any]:
    lives = run.attempts
    counted = effective(lives)
    made = [counted[n] for n in sorted(counted)]
    outcome = outcome_of(run)
    times = [max(part.time_ns for part in parts) / 1e9 for parts in (made[:1] + made[-1:])]
    return {
        "run": run.name,
        "status": "done" if (Path(run.folder) / "done.json").is_file() else "unfinished",
        "steps": len(made),
        "planned": body["steps"],
        "loss": loss_of(made[-1]) if made else None,
        "workers": [a.world_size for a, _ in lives],
        "replayed": replayed(lives),
        "goodput": _goodput(run, times),
        "forecast": None if outcome is None else outcome.to_dict(),
        "began": _moment(body["time"]),
        "last_step": _moment(times[-1]) if times else None,
        "tables": body.get("tables") or [body["table"]],
        "trace_id": run.trace_id,
        "problem": "",
    }


def _goodput(run: Run, times: list[float]) -> float | None:
    """Share of the time between the first and the last step that no change of workers took."""
    lasted = times[-1] - times[0] if times else 0.0
    if lasted <= 0:
        return None
    return max(0.0, 1 - sum(p.seconds for p in run.pauses) / lasted)


def _versions(state: ModelState) -> list[dict[str, Any]]:
    pointer = state.pointer
    rows: list[dict[str, Any]] = []
    for number, entry in sorted(state.versions.items()):
        lineage = entry.lineage
        rows.append(
            {
                "model": entry.model,
                "version": number,
                "roles": [r for r in ROLES if getattr(pointer, r) == number],
                "aliases": sorted(a for a, n in state.aliases.items() if n == number),
                "share": pointer.share if pointer.trial == number else None,
                "metrics": dict(entry.metrics),
                "measured": {table: dict(found) for table, found in entry.measured.items()},
                "tags": dict(entry.tags),
                "note": entry.note,
                "protected": entry.protected,
                "run": lineage.get("run"),
                "step": lineage.get("step"),
                "checkpoint": entry.checkpoint,
                "tables": sources_of(lineage),
                "created": entry.created.isoformat(timespec="seconds"),
                "by": entry.actor,
                "trace_id": entry.trace_id,
            }
        )
    return rows


def _moment(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, tz=UTC).isoformat(timespec="seconds")
