"""Training: a person's own torch loop, elastic on Ray Train, with every row accounted for."""

from lepton.training.evaluation import Evaluation, evaluate
from lepton.training.register import register
from lepton.training.run import Consumption, Run, load_run
from lepton.training.trainer import train
from lepton.training.worker import Worker

__all__ = [
    "Consumption",
    "Evaluation",
    "Run",
    "Worker",
    "evaluate",
    "load_run",
    "register",
    "train",
]
