"""Transforms that training and serving share, so that both see the same numbers."""

from lepton.preprocess.preparation import Preparation
from lepton.preprocess.split import assign_split
from lepton.preprocess.steps import Cast, Categories, Fill, MinMax, Standard, Step

__all__ = [
    "Cast",
    "Categories",
    "Fill",
    "MinMax",
    "Preparation",
    "Standard",
    "Step",
    "assign_split",
]
