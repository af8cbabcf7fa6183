"""Training: a person's own torch loop, elastic on Ray Train, with every row accounted for."""

from lepton.training.evaluation import Evaluation, evaluate
from lepton.training.folds import CrossValidation, cross_validate
from lepton.training.planner import Outcome, outcome_of
from lepton.training.register import register
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
