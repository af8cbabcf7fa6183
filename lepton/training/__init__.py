"""Training: a person's own torch loop, elastic on Ray Train, with every row accounted for.

Reading of a run must not wait for torch, so names are looked up when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lepton.training.register import register  # at once: its module has the same name

if TYPE_CHECKING:
    from lepton.training.evaluation import Evaluation, evaluate
    from lepton.training.folds import CrossValidation, cross_validate
    from lepton.training.planner import Outcome, outcome_of
    from lepton.training.run import Consumption, Run, load_run
    from lepton.training.stopping import EarlyStopping
    from lepton.training.trainer import train
    from lepton.training.validation import Validation
    from lepton.training.worker import Worker

__all__ = [
    "Consumption",
    "CrossValidation",
    "EarlyStopping",
    "Evaluation",
    "Outcome",
    "Run",
    "Validation",
    "Worker",
    "cross_validate",
    "evaluate",
    "load_run",
    "outcome_of",
    "register",
    "train",
]

_MODULES = {
    "Consumption": "run",
    "CrossValidation": "folds",
    "EarlyStopping": "stopping",
    "Evaluation": "evaluation",
    "Outcome": "planner",
    "Run": "run",
    "Validation": "validation",
    "Worker": "worker",
    "cross_validate": "folds",
    "evaluate": "evaluation",
    "load_run": "run",
    "outcome_of": "planner",
    "train": "trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lepton.training' has no attribute {name!r}")
    value = getattr(import_module(f"lepton.training.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
