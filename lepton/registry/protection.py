"""Which versions of a table are still needed: by registered models, and by runs not yet done."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lepton.errors import RegistryError
from lepton.lake.home import home_of
from lepton.registry.moves import Registry


def needed_versions(
    uri: str | os.PathLike[str], home: str | os.PathLike[str] | None = None
) -> dict[int, tuple[str, ...]]:
    """Return the versions of a table that something in a home names, and what names each.

    Every registered model version counts, and every run without its ``done.json``. A vacuum takes
    the keys: ``vacuum(uri, protect=needed_versions(uri))``. A run that follows its table is known
    by the version it began with; the later ones, and streams read outside of runs, are only safe
    for as long as the table's retention.

    Raises:
        RegistryError: a run's file cannot be read, so what it needs is not known.
    """
    root, wanted = home_of(home), _normal(os.fspath(uri))
    users: dict[int, list[str]] = {}
    registry = Registry(f"{root}/registry")
    for model in registry.models():
        for number, entry in sorted(registry.state(model).versions.items()):
            lineage = entry.lineage
            first = f"{lineage.get('table')}@{lineage.get('table_version')}"
            for source in {first, *lineage.get("tables", ())}:
                table, _, version = source.rpartition("@")
                if version.isdigit() and _normal(table) == wanted:
                    users.setdefault(int(version), []).append(f"model {model} version {number}")
    for name, sources in _unfinished(Path(root) / "runs"):
        for source in sources:
            table, _, version = source.rpartition("@")
            if _normal(table) == wanted:
                users.setdefault(int(version), []).append(f"run {name}")
    return {version: tuple(names) for version, names in sorted(users.items())}


def _unfinished(runs: Path) -> list[tuple[str, list[str]]]:
    """Name and ``table@version`` (several of a mixture) of each run that is not done."""
    found: list[tuple[str, list[str]]] = []
    for path in sorted(runs.glob("*/run.json")):
        if (path.parent / "done.json").is_file():
            continue
        try:
            body = json.loads(path.read_text())
            sources = [str(t) for t in body.get("tables") or [body["table"]]]
            for source in sources:
                int(source.rpartition("@")[2])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise RegistryError(
                f"cannot tell which table the run in {str(path)!r} reads: {e!r}; repair the file, "
                "or remove the run's folder if nobody goes on with it"
            ) from e
        found.append((path.parent.name, sources))
    return found


def _normal(uri: str) -> str:
    text = uri.removeprefix("file://").rstrip("/")
    return text if "://" in text else str(Path(text).resolve())
