"""A run as one self-contained page: loop, loss, trace, answers. No network, no script needed."""

from lepton.report.model import Fault, LossPoint, Report, Sample, Span, Stage
from lepton.report.page import render

__all__ = ["Fault", "LossPoint", "Report", "Sample", "Span", "Stage", "render"]
