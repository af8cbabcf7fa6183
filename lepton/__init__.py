"""lepton: from a Delta table to a served, traced model in one loop on Ray.

Importing this loads neither Ray nor torch; each name loads what it needs when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lepton.errors import LeptonError as LeptonError
    from lepton.lake import Snapshot as Snapshot
    from lepton.lake import table as table
    from lepton.lake import write as write
    from lepton.monitoring import feedback as feedback
    from lepton.preprocess import Preparation as Preparation
    from lepton.promotion import promote as promote
    from lepton.promotion import rollback as rollback
    from lepton.registry import ModelVersion as ModelVersion
    from lepton.serving import App as App
    from lepton.serving import attach
    from lepton.serving import load as load
    from lepton.stream import Shard as Shard
    from lepton.stream import Stream as Stream
    from lepton.training import EarlyStopping as EarlyStopping
    from lepton.training import Run as Run
    from lepton.training import Validation as Validation
    from lepton.training import Worker as Worker
    from lepton.training import cross_validate as cross_validate
    from lepton.training import evaluate as evaluate
    from lepton.training import register as register
    from lepton.training import train as train
    from lepton.training.planner import plan as plan
    from lepton.training.ray_tuner import tune as tune

    app = attach

__version__ = "0.1.0"

_HOMES = {
    "App": "lepton.serving",
    "EarlyStopping": "lepton.training",
    "LeptonError": "lepton.errors",
    "ModelVersion": "lepton.registry",
    "Preparation": "lepton.preprocess",
    "Run": "lepton.training",
    "Shard": "lepton.stream",
    "Snapshot": "lepton.lake",
    "Stream": "lepton.stream",
    "Validation": "lepton.training",
    "Worker": "lepton.training",
    "app": "lepton.serving:attach",
    "cross_validate": "lepton.training",
    "evaluate": "lepton.training",
    "feedback": "lepton.monitoring",
    "load": "lepton.serving",
    "plan": "lepton.training.planner",
    "promote": "lepton.promotion",
    "register": "lepton.training",
    "rollback": "lepton.promotion",
    "table": "lepton.lake",
    "train": "lepton.training",
    "tune": "lepton.training.ray_tuner",
    "write": "lepton.lake",
}

__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lepton' has no attribute {name!r}")
    home, _, other = _HOMES[name].partition(":")
    value = getattr(import_module(home), other or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
