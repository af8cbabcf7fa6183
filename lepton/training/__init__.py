"""Training: a person's own torch loop, elastic on Ray Train, with every row accounted for."""

from lepton.training.evaluation import Evaluation, evaluate
from lepton.training.run import Consumption, Run
from lepton.training.trainer import train
from lepton.training.worker import Worker

__all__ = ["Consumption", "Evaluation", "Run", "Worker", "evaluate", "train"]
