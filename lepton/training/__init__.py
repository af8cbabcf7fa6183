"""Training: a person's own torch loop, elastic on Ray Train, with every row accounted for."""

from lepton.training.evaluation import Evaluation, evaluate
from lepton.training.register import register
from lepton.training.run import Consumption, Run, load_run
from lepton.training.stopping import EarlyStopping
from lepton.training.trainer import train
from lepton.training.validation import Validation
from lepton.training.worker import Worker

__all__ = [
    "Consumption",
    "EarlyStopping",
    "Evaluation",
    "Run",
    "Validation",
    "Worker",
    "evaluate",
    "load_run",
    "register",
    "train",
]
